// What was recorded of the model in full, dropped and healed: the same question to each side by side, beside what each
// takes, and this server's own answer to it on request.

import { Answer, ENDINGS } from "./answer.js";
import { element } from "./dom.js";
import { formatBytes, formatChange, formatMegabytes, plural } from "./format.js";

export class Recorded {
  constructor(root, server) {
    Object.assign(this, { root, server, abort: new AbortController() });
  }

  /** From GET /v1/drop. Without a recording nothing is shown. */
  show({ comparison, summary, healing }) {
    this.root.hidden = comparison === null;
    this.root.replaceChildren();
    if (comparison === null) return;
    this.comparison = comparison;
    this.served = comparison.forms.find((form) => form.summary === summary && form.healing === healing);
    this.place = element("div", { className: "exchange" });
    this.root.append(this.chooser(), this.place, this.provenance(summary));
    this.choose(0);
  }

  chooser() {
    const choices = this.comparison.questions.map((question, index) => {
      const choice = element("input", { type: "radio", name: "recorded", checked: index === 0, "aria-label": question });
      choice.addEventListener("change", () => this.choose(index));
      return element("label", { title: question }, choice, String(index + 1));
    });
    return element("fieldset", {}, element("legend", {}, "Recorded answers"), ...choices);
  }

  choose(index) {
    this.abort.abort(); // what this server is still saying to another question
    const question = this.comparison.questions[index];
    const answers = element("div", { className: "answers" });
    answers.append(...this.comparison.forms.map((form) => this.column(form, index)));
    const live = element("button", { type: "button" }, "Ask this server");
    live.addEventListener("click", () => this.ask(question, answers, live));
    this.place.replaceChildren(element("p", { className: "question" }, question), answers, live);
  }

  column(form, index) {
    const [full] = this.comparison.forms;
    const { same, other, tokens, finish_reason: finish } = form.answers[index];
    const change = (name) => (form === full ? "" : ` ${formatChange(full[name], form[name])}`);
    const figures = [
      ["Dropped", gone(form.mask), ""],
      ["KV per token", formatBytes(form.kv_bytes_per_token), change("kv_bytes_per_token")],
      ["Weights", formatMegabytes(form.weight_bytes), change("weight_bytes")],
    ].map(([name, value, won]) => {
      const shown = element("span", {}, value, element("span", { className: "change" }, won));
      return element("p", { className: "row" }, element("span", {}, name), shown);
    });
    const text = element("p", { className: "text" }, same);
    if (other) text.append(element("mark", {}, other));
    const ends = same === full.answers[index].same ? "word for word the same" : "ends earlier";
    const said = form === full ? "" : other ? "marked where it parts" : ends;
    const parts = [said, plural(tokens, "token"), ENDINGS[finish] ?? finish].filter(Boolean);
    const times = element("p", { className: "times" }, ...parts.map((part) => element("span", {}, part)));
    const served = form === this.served;
    const name = element("h4", { title: form.summary }, form.name, served ? ", as served here" : "");
    return element("article", { className: served ? "answer own" : "answer" }, name, ...figures, text, times);
  }

  /** As it was recorded: a chat of its own, the most likely tokens, no more than then. */
  async ask(question, answers, button) {
    this.abort = new AbortController();
    const options = { temperature: 0, maxTokens: this.comparison.max_tokens, signal: this.abort.signal };
    const answer = new Answer("this server, now", "own");
    button.disabled = true;
    answers.append(answer.node);
    await answer.stream(this.server, [{ role: "user", content: question }], options);
    button.hidden = !answer.failed;
    button.disabled = false;
  }

  provenance(summary) {
    const { date, max_tokens: most, kv_dtype: dtype, prompts, forms, provenance } = this.comparison;
    const tokens = `the most likely tokens, ${most} at most, computed in ${provenance.dtype}`;
    const said = [`Recorded on ${date}: ${tokens}; questions: ${prompts}.`];
    for (const { name, summary: what, healing } of forms) said.push(`${name}: ${healing ?? what}.`);
    const other = this.served ? "" : `None of these is what this server runs (${summary}). `;
    return element(
      "details",
      { className: "hint" },
      element("summary", {}, `${other}Where this comes from; KV cache counted in ${dtype}`),
      ...said.map((line) => element("p", {}, line)),
      element("code", {}, provenance.command),
    );
  }
}

/** How much a mask takes; which layers, its summary says. */
function gone({ num_hidden_layers: layers, attention, mlp }) {
  const kinds = Object.entries({ attention, MLP: mlp }).filter(([, dropped]) => dropped.length);
  return kinds.map(([kind, dropped]) => `${dropped.length} of ${layers} ${kind}`).join(", ") || "nothing";
}
