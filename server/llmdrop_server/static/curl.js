// The line that asks this server from a terminal.

import { byId } from "./dom.js";

const quote = (word) => (/^[\w:/.@-]+$/.test(word) ? word : `'${word.replaceAll("'", String.raw`'\''`)}'`);

export function curlLine({ baseUrl, model, hasChatTemplate, key }) {
  const path = hasChatTemplate ? "v1/chat/completions" : "v1/completions";
  const question = hasChatTemplate ? { messages: [{ role: "user", content: "Hello" }] } : { prompt: "Hello" };
  const words = ["curl", quote(baseUrl + path), "-H", quote("Content-Type: application/json")];
  // The key itself stays out of terminals' histories.
  if (key) words.push("-H", '"Authorization: Bearer $API_KEY"');
  return [...words, "-d", quote(JSON.stringify({ model, ...question }))].join(" ");
}

/** The copy button. Without a clipboard (plain http from another machine) the line is selected instead. */
export function enableCopying() {
  const [button, line] = [byId("copy"), byId("curl")];
  button.addEventListener("click", async () => {
    getSelection().selectAllChildren(line);
    if (navigator.clipboard) await navigator.clipboard.writeText(line.textContent);
    button.textContent = navigator.clipboard ? "Copied" : "Selected";
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
}
