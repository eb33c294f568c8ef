// Server-sent events as OpenAI's API uses them: `data:` lines, an empty line after each event, `[DONE]` at the end.

/** The JSON of each event of a fetch response, as it arrives; throws if the stream ends before `[DONE]`. */
export async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection was closed");
    // A chunk may end anywhere, between \r and \n too, so only whole events are looked at.
    pending += value;
    const events = pending.split(/\r?\n\r?\n/);
    pending = events.pop();
    for (const event of events) {
      const data = eventData(event);
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

function eventData(event) {
  return event
    .split(/\r?\n/)
    .filter((line) => line.startsWith("data:"))
    .map((line) => line.slice(5).trimStart())
    .join("\n");
}
