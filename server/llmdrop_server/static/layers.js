// The model as a column of layers: an attention and an MLP cell each, kept or dropped, shaded by importance.

import { element } from "./dom.js";
import { ordinal } from "./format.js";

const SUBLAYERS = ["attention", "mlp"];
const NAMES = { attention: "attention", mlp: "MLP" };
// Deeper models are folded into columns side by side, like text.
const MAX_ROWS = 32;
const SHADES = 5;
const importanceFormat = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

export class LayerMap {
  constructor(grid, readout, legend) {
    Object.assign(this, { grid, readout, legend });
    grid.addEventListener("keydown", (event) => this.moveFocus(event));
    // The cell under the pointer, else the focused one, else what the column shows as a whole.
    grid.addEventListener("mouseover", (event) => this.read(event.target.closest(".cell")));
    grid.addEventListener("mouseleave", () => this.read(null));
    grid.addEventListener("focusin", (event) => this.read(event.target));
    grid.addEventListener("focusout", () => this.read(null));
  }

  show({ mask, scores }) {
    Object.assign(this, { mask, scores });
    this.layers = mask.num_hidden_layers;
    this.scale = scores && importanceScale(scores.importance);
    const columns = Math.ceil(this.layers / MAX_ROWS);
    this.rows = Math.ceil(this.layers / columns);
    this.cells = Array.from({ length: this.layers }, (_, layer) => SUBLAYERS.map((name) => this.cell(layer, name)));
    this.focused = this.cells[0][0];
    this.focused.tabIndex = 0;
    this.grid.classList.toggle("folded", columns > 2);
    this.grid.style.setProperty("--columns", columns);
    this.grid.style.setProperty("--rows", this.rows);
    this.grid.replaceChildren(...Array.from({ length: columns }, (_, column) => this.column(column)));
    this.grid.setAttribute("aria-rowcount", this.layers);
    this.legend.replaceChildren(...this.legendNodes());
    this.read(null);
  }

  column(index) {
    const layers = this.cells.slice(index * this.rows, (index + 1) * this.rows);
    const rows = layers.map((cells, offset) => {
      const layer = index * this.rows + offset;
      const header = element("span", { role: "rowheader", className: "layer-index" }, String(layer));
      return element("div", { role: "row", className: "layer", "aria-rowindex": layer + 1 }, header, ...cells);
    });
    const headings = this.rows * 2 < this.layers ? ["A", "M"] : ["attention", "MLP"];
    const [attention, mlp] = headings.map((name) => element("span", {}, name));
    const headingProperties = { className: "layer heading", "aria-hidden": "true" };
    const heading = element("div", headingProperties, element("span"), attention, mlp);
    return element("div", { role: "rowgroup", className: "layer-column" }, heading, ...rows);
  }

  cell(layer, sublayer) {
    const rank = this.mask[sublayer].indexOf(layer) + 1;
    const importance = this.scores?.importance[sublayer][layer] ?? null;
    const node = element("div", {
      role: "gridcell",
      className: `cell ${rank ? "dropped" : "kept"}`,
      tabIndex: -1,
    });
    // In a folded column the rank is left to the readout: there is no room for it.
    if (rank) node.append("×", element("span", { className: "rank" }, String(rank)));
    Object.assign(node.dataset, { layer, sublayer });
    if (importance !== null) node.dataset.shade = this.scale.shade(importance);
    node.setAttribute("aria-label", this.describe(layer, sublayer, rank, importance));
    return node;
  }

  describe(layer, sublayer, rank, importance) {
    const state = rank
      ? `dropped, ${ordinal(rank)} of ${this.mask[sublayer].length} to go`
      : this.kept(layer, sublayer);
    const place = `Layer ${layer}, ${NAMES[sublayer]}: ${state}.`;
    if (!this.scores) return place;
    const block = importanceFormat.format(this.scores.importance.block[layer]);
    if (importance === null) return `${place} Already gone when the model was scored; whole block ${block}.`;
    return `${place} Importance ${importanceFormat.format(importance)}; whole block ${block}.`;
  }

  kept(layer, sublayer) {
    const window = sublayer === "attention" && (this.mask.windows ?? []).find(([windowed]) => windowed === layer);
    return window ? `kept, sees the last ${window[1]} tokens` : "kept";
  }

  read(cell) {
    const shown = cell ?? (this.grid.contains(document.activeElement) ? document.activeElement : null);
    this.readout.textContent = shown?.getAttribute("aria-label") ?? this.overview();
  }

  overview() {
    const { attention, mlp, windows = [] } = this.mask; // a server of an earlier version tells no windows
    const windowed = windows.length ? ` ${windows.length} attention sublayers see a window only.` : "";
    if (!attention.length && !mlp.length && !windowed) return `All ${this.layers} layers are whole: nothing is dropped.`;
    const [attentions, mlps] = [attention, mlp].map((dropped) => `${dropped.length} of ${this.layers}`);
    return `Dropped: ${attentions} attention, ${mlps} MLP sublayers.${windowed} Point at a cell for its numbers.`;
  }

  moveFocus(event) {
    const { layer, sublayer } = event.target.dataset;
    const target = this.neighbour(Number(layer), SUBLAYERS.indexOf(sublayer), event.key);
    if (!target) return;
    event.preventDefault(); // the arrow keys would scroll
    this.focused.tabIndex = -1;
    this.focused = target;
    target.tabIndex = 0;
    target.focus();
  }

  neighbour(layer, side, key) {
    const at = (index, which) => this.cells[index]?.[which];
    switch (key) {
      case "ArrowUp":
        return at(layer - 1, side);
      case "ArrowDown":
        return at(layer + 1, side);
      case "ArrowLeft":
        return side ? at(layer, 0) : at(layer - this.rows, 1);
      case "ArrowRight":
        return side ? at(layer + this.rows, 0) : at(layer, 1);
      case "Home":
        return at(0, side);
      case "End":
        return at(this.layers - 1, side);
    }
  }

  legendNodes() {
    const dropped = element("span", { className: "cell dropped" }, "×1");
    const nodes = [element("p", {}, dropped, " dropped; ×1 is missed least")];
    if (!this.scores) {
      const kept = element("span", { className: "cell kept" });
      return [...nodes, element("p", {}, kept, " kept; this checkpoint came without importance scores")];
    }
    const ramp = Array.from({ length: SHADES }, (_, shade) => {
      const swatch = element("span", { className: "cell kept" });
      swatch.dataset.shade = shade;
      return swatch;
    });
    const [low, high] = this.scale.ends.map((end) => importanceFormat.format(end));
    const scale = element("p", {}, `importance ${low} `, element("span", { className: "ramp" }, ...ramp), ` ${high}`);
    const calibration = this.scores.calibration ? `, on ${this.scores.calibration}` : "";
    const meaning = `1 − cosine similarity of input and output${calibration}; log scale`;
    return [...nodes, scale, element("p", { className: "hint" }, meaning)];
  }
}

/** Importance spans decades, so the shades are steps of its logarithm. */
function importanceScale({ attention, mlp }) {
  const known = [...attention, ...mlp].filter((value) => value !== null);
  // Rounding can leave a similarity a hair above 1.
  const floor = 1e-6;
  const logarithm = (value) => Math.log(Math.max(value, floor));
  const ends = [Math.min(...known), Math.max(...known)];
  const [low, high] = ends.map(logarithm);
  const shade = (value) => Math.min(SHADES - 1, Math.floor(((logarithm(value) - low) / (high - low || 1)) * SHADES));
  return { ends, shade };
}
