// Puts the page together: which server, what it serves, what is shown when it is not there.

import { Server } from "./api.js";
import { CapacityPanel } from "./capacity.js";
import { Chat } from "./chat.js";
import { comparedOrigin, SecondServer } from "./compare.js";
import { curlLine, enableCopying } from "./curl.js";
import { byId, element } from "./dom.js";
import { askForKey } from "./key.js";
import { LayerMap } from "./layers.js";
import { LivePanel } from "./live.js";
import { Recorded } from "./recorded.js";
import { Watch } from "./watch.js";

// This file is at static/llmdrop/ under the server's root, wherever a proxy has put that.
const own = new Server(new URL("../../", import.meta.url).href);
const layers = new LayerMap(byId("layers"), byId("readout"), byId("legend"));
const capacity = new CapacityPanel(byId("capacity"), byId("kv-use"));
const live = new LivePanel(byId("tiles"));
const recorded = new Recorded(byId("recorded"), own);

const STATES = { up: "Running", down: "Engine down", gone: "No answer", key: "API key needed", paused: "Paused" };

function showState(state, reason) {
  if (document.body.dataset.state !== state) byId("state").textContent = STATES[state];
  document.body.dataset.state = state;
  if (state === "down") showAlert(`The engine is down${reason ? `: ${reason}` : "."}`);
  else if (state === "gone") showAlert(`${own.baseUrl} does not answer.`);
  else showAlert(null);
  if (state === "key") askForKey(own, byId("key"), () => watch.resume());
  if (state !== "up") live.interrupt();
}

/** Written only when it changes: a screen reader says each new alert. */
function showAlert(text) {
  const sentence = text?.replace(/\.?$/, ".");
  const shown = text && `${sentence} This page asks again every 2 seconds and goes on when it is back.`;
  if (byId("alert").textContent !== (shown ?? "")) byId("alert").textContent = shown ?? "";
  byId("alert").hidden = !shown;
}

async function showModel() {
  const [drop, models] = await Promise.all([own.json("v1/drop"), own.json("v1/models")]);
  const names = models.data.map(({ id }) => id);
  own.model = names.includes(own.model) ? own.model : names[0];
  own.hasChatTemplate = true;
  document.title = `${drop.model} · llmdrop-vllm`;
  byId("model").textContent = drop.model;
  byId("summary").textContent = drop.summary;
  const facts = [drop.architecture, `${drop.kv_dtype} KV cache`];
  if (drop.healing !== null) facts.push(drop.healing.split(", ")[0]);
  byId("facts").textContent = facts.join(" · ");
  byId("facts").title = drop.healing ?? "";
  byId("choose-model").replaceChildren(...names.map((name) => element("option", {}, name)));
  byId("choose-model").value = own.model;
  byId("model-choice").hidden = names.length === 1;
  limitAnswers(drop.max_model_len);
  layers.show(drop);
  capacity.show(drop);
  recorded.show(drop);
  showHowToAsk();
}

/** A short context leaves room for the prompt. */
function limitAnswers(maxModelLen) {
  const input = byId("max-tokens");
  input.max = maxModelLen - 1;
  if (input.valueAsNumber > maxModelLen / 2) input.value = Math.floor(maxModelLen / 2);
}

function showHowToAsk() {
  document.querySelector("footer").hidden = false;
  byId("curl").textContent = curlLine(own);
  byId("no-chat-template").hidden = own.hasChatTemplate;
}

function startChat() {
  const lanes = [{ server: own, role: "own", label: () => `${own.model} on this server` }];
  try {
    const origin = comparedOrigin(location.search);
    if (origin) {
      const second = new SecondServer(origin, byId("second"));
      lanes.push({ server: second.server, role: "other", label: () => second.label });
      byId("compare").value = origin;
      byId("stop-comparing").hidden = false;
      document.body.classList.add("comparing");
      second.connect();
    }
  } catch (error) {
    byId("second").textContent = error.message;
  }
  return new Chat(lanes, showHowToAsk);
}

const watch = new Watch(own, {
  onUp: showModel,
  onReading(metrics, kv) {
    live.add(metrics);
    if (kv) capacity.showUse(kv);
  },
  onState: showState,
  onPause: () => showState("paused"),
});

byId("choose-model").addEventListener("change", (event) => {
  own.model = event.target.value;
  showHowToAsk();
});
enableCopying();
startChat();
watch.start();
