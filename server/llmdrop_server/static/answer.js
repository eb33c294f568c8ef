// An answer on the page: its text as it streams, and its times.

import { ApiError, Unreachable } from "./api.js";
import { complete, Stopwatch } from "./completion.js";
import { element } from "./dom.js";
import { formatRate, formatSeconds, plural } from "./format.js";

export const ENDINGS = { stop: "", length: "cut at max tokens", aborted: "stopped by you" };

export class Answer {
  /** `label` says whose answer it is, where there are two. */
  constructor(label, role) {
    this.watch = new Stopwatch();
    this.text = document.createTextNode("");
    this.reasoning = document.createTextNode("");
    this.thoughts = element("p", { className: "reasoning", hidden: true }, this.reasoning);
    this.times = element("p", { className: "times" }, "waiting for the first token");
    this.node = element("article", { className: `answer ${role}`, "aria-busy": "true", "aria-label": label });
    if (role !== "only") this.node.append(element("h4", {}, label));
    this.node.append(this.thoughts, element("p", { className: "text" }, this.text), this.times);
  }

  /** Streams into the page. Never throws: `failed` is what went wrong, in words. */
  async stream(server, messages, options) {
    try {
      server.model ??= await server.firstModel();
      this.watch.start();
      for await (const event of complete(server, messages, options)) this.add(event);
      this.finish ??= "stop";
    } catch (error) {
      if (options.signal.aborted) this.finish = "aborted";
      else this.fail(error);
    }
    this.showTimes();
    this.node.setAttribute("aria-busy", "false");
    return this;
  }

  add({ text, reasoning, tokens, finish }) {
    if (text || reasoning) this.watch.piece();
    this.text.appendData(text);
    this.reasoning.appendData(reasoning);
    this.thoughts.hidden = !this.reasoning.length;
    this.watch.tokens = tokens ?? this.watch.tokens;
    this.finish = finish ?? this.finish;
    if (this.watch.pieces) this.showTimes();
  }

  fail(error) {
    this.failed = explain(error);
    this.node.append(element("p", { className: "failure", role: "alert" }, this.failed));
  }

  showTimes() {
    const { ttftSeconds, tokensPerSecond, tokens, count } = this.watch;
    const parts = [];
    if (ttftSeconds !== null) parts.push(`TTFT ${formatSeconds(ttftSeconds)}`);
    if (tokensPerSecond !== null) parts.push(`${formatRate(tokensPerSecond)} tokens/s`);
    // Without the server's own count it is one of pieces, which may hold several tokens.
    if (count) parts.push(`${tokens === null ? "≈ " : ""}${plural(count, "token")}`);
    if (this.finish) parts.push(ENDINGS[this.finish] ?? this.finish);
    const shown = parts.filter(Boolean).map((part) => element("span", {}, part));
    this.times.replaceChildren(...shown);
  }
}

function explain(error) {
  if (error.status === 401) return "The server wants an API key, or another one.";
  if (error.status === 429) {
    const when = error.retryAfterSeconds === null ? "later" : `in ${plural(error.retryAfterSeconds, "second")}`;
    return `The server is full. Try again ${when}.`;
  }
  if (error instanceof ApiError || error instanceof Unreachable) return error.message;
  return `The answer broke off: ${error.message}`;
}
