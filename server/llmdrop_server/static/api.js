// A server with OpenAI's API: where it is, which key it gets, how its errors read.

/** An answer that is not a success; `message` is the server's own. */
export class ApiError extends Error {
  constructor(status, message, retryAfterSeconds = null) {
    super(message);
    this.status = status;
    this.retryAfterSeconds = retryAfterSeconds;
  }
}

/** No answer at all: no network, no process at that address, or a browser that may not read what it says. */
export class Unreachable extends Error {}

export class Server {
  /** `baseUrl` ends in a slash. */
  constructor(baseUrl) {
    this.baseUrl = baseUrl;
    this.model = null;
    // Found out by asking: a model without a chat template answers 400.
    this.hasChatTemplate = true;
  }

  // A key belongs to one base URL, so the key of this server is never sent to a server that is compared with it, nor
  // the key of one of those to the next. Session storage ends with the tab.
  get key() {
    return sessionStorage.getItem(`llmdrop-key ${this.baseUrl}`);
  }

  set key(key) {
    if (key === null) sessionStorage.removeItem(`llmdrop-key ${this.baseUrl}`);
    else sessionStorage.setItem(`llmdrop-key ${this.baseUrl}`, key);
  }

  /** The response, whatever its status. With `body` a POST of JSON, else a GET. */
  fetch(path, { body, signal, mode } = {}) {
    const headers = {};
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    if (body) headers["Content-Type"] = "application/json";
    const answer = fetch(this.baseUrl + path, {
      method: body ? "POST" : "GET",
      headers: mode === "no-cors" ? {} : headers,
      body: body && JSON.stringify(body),
      mode,
      signal,
      cache: "no-store",
      referrerPolicy: "no-referrer",
    });
    return answer.catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Unreachable(`${this.baseUrl} does not answer.`, { cause: error });
    });
  }

  /** The response, if it is a success. */
  async request(path, options) {
    const response = await this.fetch(path, options);
    if (!response.ok) throw await readError(response);
    return response;
  }

  async json(path, options) {
    return (await this.request(path, options)).json();
  }

  /** The name to ask for: adapters come after the model itself. */
  async firstModel() {
    return (await this.json("v1/models")).data[0].id;
  }
}

/** The error that a response carries: OpenAI's form, or no JSON at all from a proxy in between. */
async function readError(response) {
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `${response.status} ${response.statusText}`;
  const retryAfter = Number.parseFloat(response.headers.get("Retry-After"));
  return new ApiError(response.status, message, Number.isNaN(retryAfter) ? null : retryAfter);
}
