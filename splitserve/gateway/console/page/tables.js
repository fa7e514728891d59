// The tables: workers by pool, requests in flight, KV transfers, and the list of what changed.

import { Rows, byId, h, setText } from "./dom.js";
import { NONE, age, bytes, clock, count, rate, seconds, share, short } from "./format.js";

const POOLS = ["prefill", "decode"];
const HEALTH_SAYS = {
  ready: "It takes requests.",
  silent: "It has missed heartbeats; it gets no new requests.",
  failing: "It made no token when it was asked for one; it gets no requests.",
  draining: "It takes no new requests, and leaves when it holds none.",
  gone: "Its process has ended, or was not heard of for too long.",
};

const figure = (text, title) => ({ class: "n", text, title });

export class Workers {
  constructor() {
    this.table = byId("workers");
    this.pools = new Map();
  }

  show(workers, history) {
    const gone = [...history.gone.values()].map(({ worker }) => ({ ...worker, health: "gone", rowClass: "gone" }));
    const everyone = [...workers, ...gone];
    const names = [...new Set([...POOLS, ...everyone.map((worker) => worker.pool)])];
    for (const pool of names) {
      const members = everyone.filter((worker) => worker.pool === pool).sort((a, b) => order(a, b));
      const { head, rows } = this.#pool(pool, history);
      const ready = members.filter((worker) => worker.health === "ready").length;
      const alive = members.filter((worker) => worker.health !== "gone").length;
      setText(head, `${pool} pool · ${ready} of ${alive} ready`);
      head.dataset.bad = String(ready === 0);
      rows.show(members, (worker) => worker.uuid, `No worker is in the ${pool} pool.`);
    }
  }

  #pool(pool, history) {
    if (!this.pools.has(pool)) {
      const head = h("th", { colspan: 11, scope: "rowgroup" });
      const heads = h("tbody", { class: "pool" }, h("tr", {}, head));
      const body = h("tbody", { "data-pool": pool });
      this.table.append(heads, body);
      this.pools.set(pool, { head, rows: new Rows(body, 11, (worker) => cells(worker, history)) });
    }
    return this.pools.get(pool);
  }
}

function order(a, b) {
  return a.name.localeCompare(b.name, "en", { numeric: true }) || Number(a.health === "gone") - Number(b.health === "gone");
}

function cells(worker, history) {
  const gone = worker.health === "gone";
  const used = worker.total_blocks - worker.free_blocks;
  const jobs = `${worker.prefills} prefills and ${worker.decodes} decodes of this router`;
  const blocks = (value) => figure(gone ? NONE : count(value));
  return [
    { text: worker.name, title: `${worker.engine}, KV by ${worker.kv_mode}, ${worker.uuid}` },
    { draw: (td) => dot(td, worker.health), title: HEALTH_SAYS[worker.health] },
    figure(gone ? NONE : `${count(worker.running)} / ${count(worker.max_sequences)}`, jobs),
    gone ? { text: NONE } : { draw: (td) => meter(td, used, worker.total_blocks), title: "used of all" },
    blocks(worker.pinned_blocks),
    blocks(worker.quarantined_blocks),
    figure(gone ? NONE : `${count(worker.prefill_tokens)} tok`, "accepted and not yet read"),
    figure(gone ? NONE : seconds(worker.step_s), "a step with decodes, of late, as the router hears them"),
    figure(gone || worker.slowdown === null ? NONE : `${worker.slowdown.toFixed(2)}×`, "what steps take, over their profile"),
    figure(gone ? NONE : rate(history.tokensPerS(worker.uuid))),
    figure(gone ? NONE : `${worker.heard_s.toFixed(1)} s ago`),
  ];
}

function dot(td, health) {
  if (!td.firstElementChild) td.replaceChildren(h("i", { class: "dot" }), h("span"));
  td.firstElementChild.dataset.health = health;
  setText(td.lastElementChild, health);
}

function meter(td, used, total) {
  const part = total ? used / total : 0;
  if (!td.querySelector("meter")) {
    td.replaceChildren(h("div", { class: "fill" }, h("meter", { min: 0, max: 1, high: 0.9 }), h("span")));
  }
  const bar = td.querySelector("meter");
  bar.value = part;
  const words = `${count(used)} / ${count(total)} · ${share(part)}`;
  bar.setAttribute("aria-label", `KV blocks used: ${words}`);
  setText(td.querySelector("span"), words);
}

export class Requests {
  constructor() {
    this.rows = new Rows(byId("requests").tBodies[0], 7, (request) => [
      { text: short(request.id), title: request.id },
      { text: request.class },
      { draw: (td) => phase(td, request.phase) },
      figure(count(request.prompt_tokens)),
      figure(count(request.output_tokens)),
      figure(age(request.age_s)),
      { text: route(request) },
    ]);
  }

  show(requests, total, waiting) {
    const shown = requests.length < total ? `the newest ${requests.length} of ${count(total)}` : `${count(total)}`;
    setText(byId("requests-note"), `${shown}, ${count(waiting)} waiting for a worker`);
    this.rows.show(requests, (request) => request.id, "Nothing waits or runs in this router.");
  }
}

function phase(td, name) {
  if (!td.firstElementChild) td.replaceChildren(h("span", { class: "phase" }));
  td.firstElementChild.dataset.phase = name;
  setText(td.firstElementChild, name);
}

function route(request) {
  if (!request.decode_worker) return NONE;
  return request.prefill_worker ? `${request.prefill_worker} → ${request.decode_worker}` : request.decode_worker;
}

export class Links {
  constructor() {
    this.rows = new Rows(byId("links").tBodies[0], 5, (link) => [
      { text: link.source ? `${link.source} → ${link.destination}` : "all others" },
      figure(count(link.transfers)),
      { class: link.failed ? "n bad" : "n", text: count(link.failed) },
      figure(bytes(link.bytes)),
      figure(link.bytes ? share(link.early_bytes / link.bytes) : NONE),
    ]);
  }

  show(links) {
    const sum = (name) => links.reduce((all, link) => all + link[name], 0);
    setText(
      byId("links-note"),
      `last five minutes: ${count(sum("transfers"))} arrived with ${bytes(sum("bytes"))}, ${count(sum("failed"))} failed`,
    );
    this.rows.show(links, (link) => `${link.source} ${link.destination}`, "No KV was moved in the last five minutes.");
  }
}

export class Events {
  constructor() {
    this.list = byId("events");
    this.last = undefined;
  }

  show(events) {
    if (events[0] === this.last) return;
    this.last = events[0];
    this.list.replaceChildren(
      ...events.map((event) =>
        h("li", { "data-kind": event.kind }, h("time", {}, clock(event.at)), " ", event.text),
      ),
    );
  }
}
