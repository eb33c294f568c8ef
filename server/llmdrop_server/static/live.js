// Live throughput, queue, KV use and latency: tiles with a number and its course over the last two minutes.

import { element, showQuantity, svg } from "./dom.js";
import { formatCount, formatRate, formatSeconds, formatShare, NONE } from "./format.js";
import { quantileSeconds, rate, wasRestarted } from "./metrics.js";

const LATENCY_WINDOW_SECONDS = 60;
const HISTORY_SECONDS = 120;
const SPARK_WIDTH = 120;
const SPARK_HEIGHT = 24;

/** What each tile shows: `values` gives its numbers, the first of which is drawn. */
const TILES = [
  {
    name: "Generated",
    values: (live) => [{ value: live.generated, text: perSecond(live.generated) }],
    peak: formatRate,
  },
  { name: "Prompt", values: (live) => [{ value: live.prompt, text: perSecond(live.prompt) }], peak: formatRate },
  {
    name: "Queue",
    values: (live) => [
      { value: live.running, text: `${formatCount(live.running)} running` },
      { value: live.waiting, text: `${formatCount(live.waiting)} waiting` },
    ],
    peak: formatCount,
  },
  {
    name: "KV cache in use",
    values: (live) => [{ value: live.kvUsage, text: formatShare(live.kvUsage) }],
    peak: formatShare,
  },
  {
    name: "First token",
    title: "Time to first token (TTFT), estimated from the server's histogram over the last minute",
    values: (live) => quantiles(live.ttft),
    peak: formatSeconds,
  },
  {
    name: "Inter-token",
    title: "Inter-token latency within a request, estimated from the server's histogram over the last minute",
    values: (live) => quantiles(live.interToken),
    peak: formatSeconds,
  },
];

function perSecond(value) {
  return value == null ? NONE : `${formatRate(value)} tokens/s`;
}

function quantiles({ p50, p95 }) {
  return [
    { label: "p50", value: p50, text: formatSeconds(p50) },
    { label: "p95", value: p95, text: formatSeconds(p95) },
  ];
}

export class LivePanel {
  constructor(root) {
    this.readings = [];
    this.tiles = TILES.map((spec) => new Tile(spec));
    root.replaceChildren(...this.tiles.map((tile) => tile.node));
  }

  /** The next reading follows a gap: what lies between is not a rate. */
  interrupt() {
    this.readings = [];
  }

  add(reading) {
    if (this.readings.length && wasRestarted(this.readings.at(-1), reading)) this.interrupt();
    const previous = this.readings.at(-1);
    this.readings.push(reading);
    // The oldest one kept is the last from before the window, so that the window is covered whole.
    while (this.readings[1]?.atSeconds <= reading.atSeconds - LATENCY_WINDOW_SECONDS) this.readings.shift();
    if (!previous) return;
    const oldest = this.readings[0];
    const live = {
      generated: rate(previous, reading, "generationTokens"),
      prompt: rate(previous, reading, "promptTokens"),
      running: reading.running,
      waiting: reading.waiting,
      kvUsage: Number.isFinite(reading.kvUsage) ? reading.kvUsage : null,
      ttft: latency(oldest.ttft, reading.ttft),
      interToken: latency(oldest.interToken, reading.interToken),
    };
    for (const tile of this.tiles) tile.show(live, reading.atSeconds);
  }
}

function latency(earlier, later) {
  return { p50: quantileSeconds(earlier, later, 0.5), p95: quantileSeconds(earlier, later, 0.95) };
}

class Tile {
  constructor(spec) {
    this.spec = spec;
    this.history = [];
    this.numbers = element("p", { className: "numbers" }, NONE);
    this.peak = element("span", { className: "peak" });
    this.line = svg("polyline", { "vector-effect": "non-scaling-stroke" });
    this.area = svg("polygon");
    const box = `0 0 ${SPARK_WIDTH} ${SPARK_HEIGHT}`;
    const spark = svg(
      "svg",
      { class: "spark", viewBox: box, preserveAspectRatio: "none", "aria-hidden": "true" },
      this.area,
      this.line,
    );
    const heading = element("h3", { title: spec.title ?? "" }, spec.name);
    this.node = element("div", { className: "tile" }, heading, this.peak, this.numbers, spark);
  }

  show(live, atSeconds) {
    const values = this.spec.values(live);
    this.numbers.replaceChildren(...values.map(quantityNode));
    this.history.push({ atSeconds, value: values[0].value });
    while (this.history[0].atSeconds < atSeconds - HISTORY_SECONDS) this.history.shift();
    const known = this.history.filter(({ value }) => value != null);
    const highest = Math.max(0, ...known.map(({ value }) => value));
    this.peak.textContent = highest > 0 ? `peak ${this.spec.peak(highest)}` : "";
    this.draw(known, highest, atSeconds);
  }

  draw(known, highest, nowSeconds) {
    const points = known.map(({ atSeconds, value }) => {
      const x = SPARK_WIDTH * (1 - (nowSeconds - atSeconds) / HISTORY_SECONDS);
      const y = SPARK_HEIGHT - 1 - (highest > 0 ? value / highest : 0) * (SPARK_HEIGHT - 3);
      return `${x.toFixed(1)},${y.toFixed(1)}`;
    });
    this.line.setAttribute("points", points.join(" "));
    const [first, last] = [points[0], points.at(-1)].map((point) => point?.split(",")[0] ?? 0);
    this.area.setAttribute("points", `${first},${SPARK_HEIGHT} ${points.join(" ")} ${last},${SPARK_HEIGHT}`);
  }
}

function quantityNode({ label, text }) {
  const number = element("span", { className: "quantity" });
  showQuantity(number, text);
  if (label) number.prepend(element("span", { className: "label" }, `${label} `));
  return number;
}
