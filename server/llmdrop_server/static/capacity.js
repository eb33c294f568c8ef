// What dropping saves: the model in full against the model as it is served, and the KV cache in use right now.

import { element } from "./dom.js";
import { formatBytes, formatChange, formatCount, formatDecimal, formatRate, formatShare, plural } from "./format.js";

export class CapacityPanel {
  constructor(root, live) {
    Object.assign(this, { root, live });
  }

  /** The static part, from GET /v1/drop. */
  show({ full, served, max_model_len: maxModelLen, kv_layout: kvLayout }) {
    const length = formatCount(maxModelLen);
    this.root.replaceChildren(
      headline(full, served),
      comparison("KV cache per token", full.kv_bytes_per_token, served.kv_bytes_per_token, formatBytes),
      comparison(`Sequences of ${length} tokens that fit`, full.sequences, served.sequences, formatDecimal),
      comparison("Parameters", full.parameters, served.parameters, formatCount),
      element("p", { className: "hint" }, `${formatCount(served.kv_tokens)} tokens in all. ${kvLayout}.`),
    );
  }

  /** The blocks in use, from GET /v1/drop/kv. */
  showUse(kv) {
    const text = `${formatCount(kv.blocks_used)} of ${formatCount(kv.blocks)} blocks`;
    const fill = element("div", { className: "fill" });
    fill.style.width = `${kv.usage * 100}%`;
    const meter = element("div", { className: "bar", role: "meter", "aria-label": "KV cache blocks in use" }, fill);
    meter.setAttribute("aria-valuemax", kv.blocks);
    meter.setAttribute("aria-valuenow", kv.blocks_used);
    meter.setAttribute("aria-valuetext", text);
    const hits = kv.prefix_hit_rate === null ? "no prompt yet" : `prefix hit rate ${formatShare(kv.prefix_hit_rate)}`;
    const details = `${kv.block_tokens} tokens each, ${hits}, ${plural(kv.preemptions, "preemption")}`;
    const name = element("b", {}, "In use now");
    this.live.replaceChildren(
      element("p", { className: "row" }, name, element("span", {}, text), formatShare(kv.usage)),
      meter,
      element("p", { className: "hint" }, details),
    );
  }
}

/** The gain in one line: the first thing to read. */
function headline(full, served) {
  const gain = full.sequences ? served.sequences / full.sequences : 1; // without a KV cache nothing was counted
  if (gain === 1) return element("p", { className: "headline" }, "The KV cache is that of the full model.");
  return element(
    "p",
    { className: "headline" },
    element("b", {}, `${formatRate(gain)}×`),
    " the requests of the full model",
  );
}

/** Two bars on one scale. Numbers stand beside them, so the bars themselves are hidden from screen readers. */
function comparison(name, full, served, format) {
  const longest = Math.max(full, served);
  const rows = [
    ["full", full],
    ["served", served],
  ].map(([form, value]) => {
    const fill = element("div", { className: `fill ${form}` });
    fill.style.width = value === null ? "0" : `${(value / longest) * 100}%`;
    const bar = element("div", { className: "bar", "aria-hidden": "true" }, fill);
    return element("div", { className: "measure" }, element("span", {}, form), bar, element("b", {}, format(value)));
  });
  const change = full === null || served === null ? "not known for this architecture" : formatChange(full, served);
  const heading = element("h3", {}, `${name} `, element("span", { className: "change" }, change));
  return element("div", { className: "comparison" }, heading, ...rows);
}
