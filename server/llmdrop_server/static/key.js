// The field for an API key, shown where a server answers 401.

import { element } from "./dom.js";

/** Asks for the key of `server` in `place`; `onKey` is called once it is stored. */
export function askForKey(server, place, onKey) {
  if (place.firstChild && !server.key) return; // asked already, and perhaps half typed
  const input = element("input", {
    type: "password",
    required: true,
    // A header takes nothing else, and fetch would fail as if the server were gone.
    pattern: "[\\x21-\\x7e]+",
    title: "printable ASCII, no spaces",
    autocomplete: "off",
    spellcheck: false,
    className: "key-input",
  });
  const refused = server.key ? "The key was not accepted. " : "";
  const form = element(
    "form",
    { className: "key" },
    element("label", {}, `${refused}API key of ${server.baseUrl} `, input),
    element("button", { type: "submit" }, "Use key"),
    element("span", { className: "hint" }, "Kept in this tab only, sent to this server only."),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    server.key = input.value;
    place.replaceChildren();
    onKey();
  });
  server.key = null;
  place.replaceChildren(form);
}
