// What the page remembers of the last ten minutes: a sample per answer, token rates, and who came and went. No I/O.

export const SPAN_S = 600;
const RATE_OVER_S = 5;
const GONE_FOR_S = 120;
const MOST_EVENTS = 100;

export class History {
  samples = []; // {at, classes: {name: {...}}, tokensPerS, running, waiting}
  events = []; // {at: Date, text, kind}, the newest first
  gone = new Map(); // by uuid: {worker, at}
  #known = new Map();
  #produced = new Map(); // by uuid: [[at, tokens], ...]
  #router = null;

  // `at` in seconds on a clock that never goes back.
  add(state, at, date) {
    if (state.router !== this.#router) this.#begin(state, date);
    this.#compare(state.workers, at, date);
    for (const worker of state.workers) this.#count(worker, at);
    const classes = Object.fromEntries(state.classes.map((each) => [each.name, each]));
    const tokensPerS = state.workers.reduce((sum, worker) => sum + this.tokensPerS(worker.uuid), 0);
    this.samples.push({ at, classes, tokensPerS, running: state.running, waiting: state.waiting });
    while (this.samples[0].at < at - SPAN_S) this.samples.shift();
  }

  // Over the last few seconds.
  tokensPerS(uuid) {
    const counted = this.#produced.get(uuid) ?? [];
    if (counted.length < 2) return 0;
    const [[from, before], [to, now]] = [counted[0], counted.at(-1)];
    return to > from ? Math.max(0, now - before) / (to - from) : 0;
  }

  // [[at, value or null], ...] for a chart.
  series(read) {
    return this.samples.map((sample) => [sample.at, read(sample) ?? null]);
  }

  // Another router, or one that started anew: its counts are no continuation.
  #begin(state, date) {
    if (this.#router !== null) this.#note(date, "info", `router ${state.router.slice(0, 8)} answers now`);
    this.#router = state.router;
    this.samples = [];
    this.#produced.clear();
    this.#known.clear();
    this.gone.clear();
  }

  #compare(workers, at, date) {
    const first = this.#known.size === 0 && this.samples.length === 0;
    const there = new Map(workers.map((worker) => [worker.uuid, worker]));
    for (const [uuid, worker] of this.#known) {
      if (there.has(uuid)) continue;
      this.gone.set(uuid, { worker, at });
      this.#produced.delete(uuid);
      this.#note(date, worker.health === "draining" ? "info" : "bad", `${worker.name} is gone`);
    }
    for (const [uuid, worker] of there) {
      const before = this.#known.get(uuid);
      const kind = worker.health === "ready" ? "good" : "bad";
      if (!before && !first) this.#note(date, kind, `${worker.name} joined the ${worker.pool} pool`);
      if (before && before.health !== worker.health) this.#note(date, kind, `${worker.name} is ${worker.health}`);
      if (before && before.pool !== worker.pool) this.#note(date, "info", `${worker.name} went to the ${worker.pool} pool`);
    }
    this.#known = there;
    for (const [uuid, { at: since }] of this.gone) if (at - since > GONE_FOR_S) this.gone.delete(uuid);
  }

  #note(date, kind, text) {
    this.events.unshift({ at: date, kind, text });
    this.events.length = Math.min(this.events.length, MOST_EVENTS);
  }

  #count(worker, at) {
    const counted = this.#produced.get(worker.uuid) ?? [];
    counted.push([at, worker.produced_tokens]);
    while (counted.length > 2 && counted[1][0] <= at - RATE_OVER_S) counted.shift();
    this.#produced.set(worker.uuid, counted);
  }
}
