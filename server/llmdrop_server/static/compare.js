// The second server: where it is, what it says of itself, and which of two answers was faster.

import { ApiError, Server } from "./api.js";
import { element } from "./dom.js";
import { formatRate, formatSeconds } from "./format.js";
import { askForKey } from "./key.js";

/** The origin in the page's `compare` query; null without one. Throws if it is no URL of a server. */
export function comparedOrigin(query) {
  const asked = new URLSearchParams(query).get("compare");
  if (!asked) return null;
  const url = URL.parse(asked);
  if (!url || !["http:", "https:"].includes(url.protocol) || url.username) {
    throw new Error(`"${asked}" is no base URL; one looks like http://127.0.0.1:8001.`);
  }
  // The server lets this page connect to an origin and nothing else, and people know base URLs with the /v1 of OpenAI's
  // clients too: those are asked for again as what they mean.
  if (asked !== url.origin) location.replace(`?${new URLSearchParams({ compare: url.origin })}`);
  return url.origin;
}

export class SecondServer {
  constructor(origin, place) {
    this.server = new Server(`${origin}/`);
    const name = element("b", {}, origin);
    this.state = element("span", { role: "status" });
    this.help = element("div", { className: "help" });
    place.replaceChildren(element("p", {}, name, " ", this.state), this.help);
  }

  get label() {
    const { model, baseUrl } = this.server;
    return model ? `${model} at ${new URL(baseUrl).host}` : baseUrl;
  }

  async connect() {
    this.state.textContent = "asking…";
    this.help.replaceChildren();
    try {
      this.server.model = await this.server.firstModel();
      this.state.textContent = `${this.server.model}: ${await this.maskSummary()}`;
    } catch (error) {
      await this.explain(error);
    }
  }

  async maskSummary() {
    try {
      return (await this.server.json("v1/drop")).summary;
    } catch (error) {
      if (error.status === 404) return "no mask reported: stock server";
      throw error;
    }
  }

  async explain(error) {
    const status = error instanceof ApiError ? error.status : null;
    if (status === 401) {
      this.state.textContent = "wants an API key";
      askForKey(this.server, this.help, () => this.connect());
      return;
    }
    const retry = element("button", { type: "button" }, "Try again");
    retry.addEventListener("click", () => this.connect());
    const closed = status === null && (await this.answersSomebody());
    this.state.textContent = closed ? "answers, but not to this page" : error.message;
    if (closed) this.help.append(corsHelp());
    this.help.append(retry);
  }

  /** A request whose answer nobody may read still tells a server without CORS from none at all. */
  async answersSomebody() {
    return this.server.fetch("health", { mode: "no-cors" }).then(
      () => true,
      () => false,
    );
  }
}

function corsHelp() {
  const option = `--allowed-origins '["${location.origin}"]'`;
  const why = "It does not allow requests from other origins (CORS). Start it with ";
  return element("p", {}, why, element("code", {}, option));
}

/** One line on two finished answers. */
export function summarize(own, other) {
  const [first, second] = [own.watch, other.watch];
  if (own.failed || other.failed) return "No comparison: an answer is missing or incomplete.";
  if (first.ttftSeconds === null || second.ttftSeconds === null) return "No comparison: an answer is empty.";
  const gap = first.ttftSeconds - second.ttftSeconds;
  const sooner = gap < 0 ? "This server" : "The second server";
  const toFirst = `${sooner} was ${formatSeconds(Math.abs(gap))} sooner with the first token`;
  if (first.tokensPerSecond === null || second.tokensPerSecond === null) return `${toFirst}.`;
  const ratio = first.tokensPerSecond / second.tokensPerSecond;
  return `${toFirst}. Tokens/s here: ${formatRate(ratio)} times the second server's.`;
}
