// vLLM's Prometheus text, and what can be computed from two readings of it.

const LINE = /^(vllm:\w+)(?:\{(.*)\})? (\S+)/gm;
const BUCKET_BOUND = /(?:^|,)le="([^"]+)"/;

/** One reading: counters and gauges summed over engines; histograms as {bound in seconds: count at or below it}. */
export function readMetrics(text, atSeconds) {
  const sums = new Map();
  const histograms = new Map();
  const engines = new Map();
  for (const [, name, labels = "", number] of text.matchAll(LINE)) {
    const value = Number(number);
    const bound = BUCKET_BOUND.exec(labels)?.[1];
    if (bound === undefined) {
      sums.set(name, (sums.get(name) ?? 0) + value);
      engines.set(name, (engines.get(name) ?? 0) + 1);
    } else {
      const buckets = histograms.get(name) ?? new Map();
      const seconds = bound === "+Inf" ? Infinity : Number(bound);
      histograms.set(name, buckets.set(seconds, (buckets.get(seconds) ?? 0) + value));
    }
  }
  return {
    atSeconds,
    promptTokens: sums.get("vllm:prompt_tokens_total"),
    generationTokens: sums.get("vllm:generation_tokens_total"),
    running: sums.get("vllm:num_requests_running"),
    waiting: sums.get("vllm:num_requests_waiting"),
    // A share of each engine's own cache: the mean, where the others are sums.
    kvUsage: sums.get("vllm:kv_cache_usage_perc") / engines.get("vllm:kv_cache_usage_perc"),
    ttft: histograms.get("vllm:time_to_first_token_seconds_bucket") ?? new Map(),
    interToken: histograms.get("vllm:inter_token_latency_seconds_bucket") ?? new Map(),
  };
}

/** Tokens per second between two readings; null where the server does not count them. */
export function rate(earlier, later, counter) {
  const perSecond = (later[counter] - earlier[counter]) / (later.atSeconds - earlier.atSeconds);
  return Number.isFinite(perSecond) ? perSecond : null;
}

/** Counters that went back: another process answers now, and the readings before it say nothing about it. */
export function wasRestarted(earlier, later) {
  return later.promptTokens < earlier.promptTokens || later.generationTokens < earlier.generationTokens;
}

/**
 * The quantile of what was observed between two readings of a histogram, as Prometheus' histogram_quantile estimates
 * it: linear within its bucket. Null if nothing was observed; the highest finite bound if it lies above that.
 */
export function quantileSeconds(earlier, later, quantile) {
  const bounds = [...later.keys()].sort((a, b) => a - b);
  const counts = bounds.map((bound) => later.get(bound) - (earlier.get(bound) ?? 0));
  const total = counts.at(-1);
  if (!(total > 0)) return null;
  const wanted = quantile * total;
  const index = counts.findIndex((count) => count >= wanted);
  if (bounds[index] === Infinity) return bounds[index - 1] ?? null;
  const [boundBelow, countBelow] = index ? [bounds[index - 1], counts[index - 1]] : [0, 0];
  return boundBelow + (bounds[index] - boundBelow) * ((wanted - countBelow) / (counts[index] - countBelow));
}
