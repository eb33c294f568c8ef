// The chat box: one prompt to one server, or to two side by side.

import { Answer } from "./answer.js";
import { byId, element } from "./dom.js";
import { summarize } from "./compare.js";

// Closer to its end than this, the log is followed as it grows; further away, someone is reading.
const FOLLOW_PX = 120;

export class Chat {
  /** `lanes`: {server, role, label()} of each server that is asked; `onAnswered` is called after each exchange. */
  constructor(lanes, onAnswered) {
    this.lanes = lanes.map((lane) => ({ ...lane, messages: [] }));
    this.onAnswered = onAnswered;
    this.log = byId("log");
    this.prompt = byId("prompt");
    this.sendButton = byId("send");
    this.stop = byId("stop");
    this.empty = this.log.lastElementChild;
    byId("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.exchange();
    });
    this.prompt.addEventListener("keydown", (event) => {
      // Shift+Enter is a new line; Enter that ends a composition (of kana, say) is the input method's own.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      byId("ask").requestSubmit();
    });
    this.stop.addEventListener("click", () => this.abort.abort());
    byId("clear").addEventListener("click", () => this.clear());
  }

  clear() {
    for (const lane of this.lanes) lane.messages = [];
    for (const each of this.log.querySelectorAll(":scope > .exchange")) each.remove();
    this.log.append(this.empty);
    this.prompt.focus();
  }

  async exchange() {
    const prompt = this.prompt.value.trim();
    if (!prompt || this.log.getAttribute("aria-busy") === "true") return;
    this.abort = new AbortController();
    this.setBusy(true);
    this.prompt.value = "";
    const answers = this.lanes.map((lane) => new Answer(lane.label(), this.lanes.length > 1 ? lane.role : "only"));
    const exchange = this.showExchange(prompt, answers);
    await Promise.all(this.lanes.map((lane, index) => this.ask(lane, prompt, answers[index])));
    if (answers.length > 1) exchange.append(element("p", { className: "verdict" }, summarize(...answers)));
    this.follower.disconnect();
    this.setBusy(false);
    // What no server has answered can be sent again.
    if (answers.every(({ failed, watch }) => failed && !watch.pieces) && !this.prompt.value) this.prompt.value = prompt;
    this.onAnswered();
  }

  async ask(lane, prompt, answer) {
    const options = {
      temperature: byId("temperature").valueAsNumber,
      maxTokens: byId("max-tokens").valueAsNumber,
      signal: this.abort.signal,
    };
    const messages = [...lane.messages, { role: "user", content: prompt }];
    await answer.stream(lane.server, messages, options);
    if (answer.failed) return;
    // A conversation goes on from what was answered, stopped or not.
    lane.messages = [...messages, { role: "assistant", content: answer.text.data }];
  }

  showExchange(prompt, answers) {
    const pair = element("div", { className: "answers" }, ...answers.map(({ node }) => node));
    const question = element("p", { className: "question" }, prompt);
    const exchange = element("section", { className: "exchange" }, question, pair);
    this.empty.remove();
    this.log.append(exchange);
    this.log.scrollTop = this.log.scrollHeight;
    this.follower = new ResizeObserver(() => this.followEnd());
    this.follower.observe(exchange);
    return exchange;
  }

  followEnd() {
    const { scrollHeight, clientHeight, scrollTop } = this.log;
    const below = scrollHeight - clientHeight - scrollTop;
    if (below < FOLLOW_PX) this.log.scrollTop = scrollHeight;
  }

  setBusy(busy) {
    this.log.setAttribute("aria-busy", String(busy));
    byId("clear").disabled = busy;
    const [before, after] = busy ? [this.sendButton, this.stop] : [this.stop, this.sendButton];
    after.hidden = false;
    // A hidden button loses the focus, and the next Tab would start at the top of the page.
    if (document.activeElement === before) after.focus();
    before.hidden = true;
  }
}
