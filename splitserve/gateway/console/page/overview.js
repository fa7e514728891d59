// The tiles and the charts.

import { Chart } from "./chart.js";
import { byId, h, setOptions, setText } from "./dom.js";
import { NONE, count, rate, seconds, share } from "./format.js";

const PERCENTILES = [
  { name: "p50", tone: "one" },
  { name: "p90", tone: "two" },
  { name: "p99", tone: "three" },
];

export class Overview {
  constructor() {
    this.tiles = new Map();
  }

  show(state, history) {
    const ready = state.workers.filter((worker) => worker.health === "ready").length;
    const ended = state.classes.reduce((sum, each) => sum + each.ended, 0);
    const met = state.classes.reduce((sum, each) => sum + each.met, 0);
    const tokens = history.samples.at(-1)?.tokensPerS ?? 0;
    this.#tile("workers ready", `${ready} / ${state.workers.length}`, ready < state.workers.length || ready === 0);
    this.#tile("requests running", count(state.running));
    this.#tile("waiting for a worker", count(state.waiting), state.waiting > 0 && ready === 0);
    this.#tile("tokens/s", rate(tokens));
    this.#tile("outputs/s, last minute", rate(ended / 60));
    this.#tile("attainment, last minute", ended ? share(met / ended) : NONE);
  }

  #tile(name, value, bad = false) {
    if (!this.tiles.has(name)) {
      const made = { value: h("b"), element: null };
      made.element = h("div", { class: "tile" }, made.value, h("span", {}, name));
      byId("overview").append(made.element);
      this.tiles.set(name, made);
    }
    const tile = this.tiles.get(name);
    setText(tile.value, value);
    tile.element.dataset.bad = String(bad);
  }
}

export class Charts {
  constructor() {
    this.choice = byId("class");
    this.ttft = new Chart("TTFT", PERCENTILES, seconds);
    this.tpot = new Chart("TPOT", PERCENTILES, seconds);
    this.attainment = new Chart("Attainment", [{ name: "met every objective", tone: "one" }], share, { most: 1 });
    this.load = new Chart(
      "Load",
      [
        { name: "running", tone: "one" },
        { name: "waiting", tone: "three" },
      ],
      count,
      { least: 2 },
    );
    byId("charts").append(...[this.ttft, this.tpot, this.attainment, this.load].map((chart) => chart.element));
    this.chosen = false;
    this.choice.addEventListener("change", () => {
      this.chosen = true;
      this.#draw();
    });
  }

  show(state, history, now) {
    setOptions(this.choice, state.classes.map((each) => each.name));
    if (!this.chosen) this.choice.value = busiest(state.classes) ?? this.choice.value;
    Object.assign(this, { state, history, now });
    this.#draw();
  }

  #draw() {
    const name = this.choice.value;
    const known = this.state?.classes.find((each) => each.name === name);
    if (!known) return;
    const of = (read) => this.history.series((sample) => sample.classes[name] && read(sample.classes[name]));
    const percentiles = (what) => PERCENTILES.map((line) => of((each) => each[what][`${line.name}_s`]));
    this.ttft.show(percentiles("ttft"), this.now, known.ttft_s, objective(known));
    this.tpot.show(percentiles("tpot"), this.now, known.tpot_s);
    this.attainment.show([of((each) => each.attainment)], this.now);
    this.load.show(
      [this.history.series((sample) => sample.running), this.history.series((sample) => sample.waiting)],
      this.now,
    );
  }
}

// In words, where each token of the prompt adds to it.
function objective(known) {
  if (known.ttft_s === null || !known.ttft_per_token_s) return "";
  return `${seconds(known.ttft_s)} + ${known.ttft_per_token_s * 1000} ms per prompt token`;
}

// Until somebody chooses: the class that has most outputs; of equals the one with objectives, or the first.
function busiest(classes) {
  const asks = (each) => Number(each.ttft_s !== null || each.tpot_s !== null);
  return [...classes].sort((a, b) => b.ended_5m - a.ended_5m || asks(b) - asks(a))[0]?.name;
}
