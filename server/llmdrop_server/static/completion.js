// One streamed answer: OpenAI's chat completions, or completions for a model without a chat template.

import { ApiError } from "./api.js";
import { readEvents } from "./sse.js";

/**
 * Yields {text, reasoning, tokens, finish} as they arrive; each event has some of them. Throws ApiError, also for an
 * error within the stream.
 */
export async function* complete(server, messages, { temperature, maxTokens, signal }) {
  const options = {
    model: server.model,
    temperature,
    max_tokens: maxTokens,
    stream: true,
    stream_options: { include_usage: true },
  };
  const response = await request(server, messages, options, signal);
  for await (const event of readEvents(response)) {
    if (event.error) throw new ApiError(event.error.code, event.error.message);
    const choice = event.choices?.[0];
    yield {
      text: choice?.delta?.content ?? choice?.text ?? "",
      reasoning: choice?.delta?.reasoning ?? choice?.delta?.reasoning_content ?? "",
      tokens: event.usage?.completion_tokens,
      finish: choice?.finish_reason,
    };
  }
}

async function request(server, messages, options, signal) {
  if (server.hasChatTemplate) {
    try {
      return await server.request("v1/chat/completions", { body: { ...options, messages }, signal });
    } catch (error) {
      if (error.status !== 400 || !/chat template/i.test(error.message)) throw error;
      server.hasChatTemplate = false;
    }
  }
  const prompt = messages.at(-1).content;
  return server.request("v1/completions", { body: { ...options, prompt }, signal });
}

/** When the first and the last token of an answer came, in seconds after it was asked for. */
export class Stopwatch {
  constructor() {
    this.ttftSeconds = null;
    this.pieces = 0;
    this.tokens = null;
  }

  start() {
    this.startMs = performance.now();
  }

  piece() {
    this.lastSeconds = (performance.now() - this.startMs) / 1000;
    this.ttftSeconds ??= this.lastSeconds;
    this.pieces += 1;
  }

  /** The server's count; until it has come, or if it never does, pieces, of which each is a token or more. */
  get count() {
    return this.tokens ?? this.pieces;
  }

  /** The rate of decoding: the first token is the prefill's. */
  get tokensPerSecond() {
    const seconds = this.lastSeconds - this.ttftSeconds;
    return seconds > 0 && this.count > 1 ? (this.count - 1) / seconds : null;
  }
}
