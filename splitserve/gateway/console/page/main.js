// The page: asks for the state once a second, and shows it or says why there is none.

import { Refused, key, state } from "./api.js";
import { byId, setOptions, setText } from "./dom.js";
import { age } from "./format.js";
import { History } from "./history.js";
import { Charts, Overview } from "./overview.js";
import { PromptBox } from "./prompt.js";
import { Events, Links, Requests, Workers } from "./tables.js";

const EVERY_MS = 1000;
const MOST_REQUESTS = 100;

const history = new History();
const parts = {
  overview: new Overview(),
  charts: new Charts(),
  workers: new Workers(),
  requests: new Requests(),
  links: new Links(),
  events: new Events(),
};
const prompt = new PromptBox((sentence) => askForKey(sentence));
let answeredAt = null;
let timer = null;
let turn = 0; // of the latest look: an earlier one that is answered late, or by another router, has no say

const now = () => performance.now() / 1000;

async function look() {
  clearTimeout(timer);
  const mine = ++turn;
  let told = null;
  try {
    told = await state(byId("router").value, MOST_REQUESTS);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.status === 400) byId("router").value = ""; // the router that was chosen is gone: any other will do
    if (mine !== turn || !explain(error)) return; // until there is a key
  }
  if (mine !== turn) return;
  if (told) show(told);
  timer = setTimeout(look, EVERY_MS);
}

function show(told) {
  answeredAt = now();
  history.add(told, answeredAt, new Date());
  setText(byId("model"), told.model);
  setText(byId("about"), `router ${told.router.slice(0, 8)} · ${told.version}`);
  setOptions(byId("router"), told.routers);
  byId("router-choice").hidden = told.routers.length < 2;
  byId("forget").hidden = !key.get();
  byId("key-form").hidden = true;
  parts.overview.show(told, history);
  parts.charts.show(told, history, answeredAt);
  parts.workers.show(told.workers, history);
  parts.requests.show(told.requests, told.requests_total, told.waiting);
  parts.links.show(told.links);
  parts.events.show(history.events);
  prompt.show(told.classes);
  const ready = told.workers.some((worker) => worker.health === "ready");
  if (told.workers.length === 0) {
    notice("warning", "No worker has joined this router. Start one with `splitserve worker --pool decode --router HOST:PORT`.");
  } else if (!ready) {
    notice("error", "No worker takes requests: all of them are silent, failing or draining.");
  } else notice(null);
  status(ready ? "live" : "impaired");
}

// Whether it is worth asking again.
function explain(error) {
  if (error.status === 401 || error.status === 403) {
    askForKey(error.message);
    return false;
  }
  const since = answeredAt === null ? "" : ` What is shown is ${age(now() - answeredAt)} old.`;
  const who = error.status === 0 ? "The gateway does not answer" : `The router can't be asked: ${error.message}`;
  notice("error", `${who}. Trying again every second.${since}`);
  status("unreachable");
  return true;
}

function askForKey(sentence) {
  const tried = key.get();
  notice("warning", tried ? `This key was refused: ${sentence}.` : "This cluster asks for an API key.");
  status("locked");
  byId("key-form").hidden = false;
  byId("forget").hidden = !tried;
  byId("key").focus();
}

function status(name) {
  const pill = byId("link");
  pill.dataset.state = name;
  setText(pill, name);
  byId("board").dataset.state = name;
  byId("board").hidden = answeredAt === null;
}

function notice(kind, sentence = "") {
  const element = byId("notice");
  element.hidden = kind === null;
  if (kind !== null) element.dataset.kind = kind;
  setText(element, sentence);
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(byId("key").value.trim());
  byId("key").value = "";
  look();
});
byId("forget").addEventListener("click", () => {
  key.forget();
  location.reload();
});
byId("router").addEventListener("change", look);

status("loading");
notice("info", "Asking the router for its fleet.");
look();
