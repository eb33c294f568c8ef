// Asks the server every two seconds how it is; stops while the tab is hidden; goes on by itself when it is back.

import { ApiError, Unreachable } from "./api.js";
import { readMetrics } from "./metrics.js";

const PERIOD_MS = 2000;
const DEADLINE_MS = 10000;

/**
 * Calls `onState(state, reason)` after each round, with state "up", "down" (the engine), "gone" (the server) or "key"
 * (it wants one), and `onReading(metrics, kv)` if it is up; kv is null where vLLM keeps no statistics. `onUp` is called,
 * and waited for, before the first of those and again after each time that the server was not up: it may have been
 * restarted with another model.
 */
export class Watch {
  constructor(server, { onUp, onReading, onState, onPause }) {
    Object.assign(this, { server, onUp, onReading, onState, onPause });
    this.isUp = false;
    this.round = 0;
  }

  start() {
    document.addEventListener("visibilitychange", () => (document.hidden ? this.pause() : this.resume()));
    this.resume();
  }

  pause() {
    clearTimeout(this.timer);
    this.round += 1; // a round under way schedules no other
    this.onPause();
  }

  async resume() {
    clearTimeout(this.timer);
    const round = (this.round += 1);
    const [state, reason] = await this.ask(round);
    if (round !== this.round) return;
    this.isUp = state === "up";
    this.onState(state, reason);
    this.timer = setTimeout(() => this.resume(), PERIOD_MS);
  }

  async ask(round) {
    const options = { signal: AbortSignal.timeout(DEADLINE_MS) };
    try {
      const health = await this.server.fetch("health", options);
      if (!health.ok) return ["down", (await health.json().catch(() => null))?.reason];
      if (!this.isUp) await this.onUp();
      const [metrics, kv] = await Promise.all([
        this.server.request("metrics", options).then((response) => response.text()),
        this.server.json("v1/drop/kv", options).catch((error) => {
          if (error.status !== 404) throw error;
          return null;
        }),
      ]);
      if (round === this.round) this.onReading(readMetrics(metrics, performance.now() / 1000), kv);
      return ["up", null];
    } catch (error) {
      if (error instanceof ApiError) return error.status === 401 ? ["key", null] : ["down", error.message];
      // Whatever else it is, half an answer say, the next round comes: the page would show its last figures for good.
      if (!(error instanceof Unreachable)) console.error(error);
      return ["gone", null];
    }
  }
}
