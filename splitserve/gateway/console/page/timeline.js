// One request's timeline: where its time went, from its arrival at the router to its last token.

import { h, s } from "./dom.js";
import { bytes, count, seconds, share } from "./format.js";

const WIDTH = 760;
const LANE = 24;
const LEFT = 104;
const RIGHT = 12;
const AXIS = 22;
const MOST_TICKS = 400;

// What there is to draw, in seconds from the arrival. `tokens`: when each piece of the answer reached this page, on any
// clock; the first of them is set to the router's TTFT.
export function lanes(timings, tokens) {
  const bound = timings.queue_s;
  const first = timings.ttft_s;
  // Both workers tell the router on their own: the prefill's end may be heard after the token that needed it.
  const told = bound + timings.prefill_s;
  const read = Math.min(told, first);
  const arrived = Math.min(read + timings.transfer_s, first);
  const ticks = tokens.map((at) => at - tokens[0] + first);
  const end = Math.max(first, ticks.at(-1) ?? first);
  const reader = timings.prefill_worker || timings.decode_worker;
  const reading =
    told > first
      ? `${reader} had read the prompt before the first token, and the router heard so ${seconds(told - first)} later`
      : `${reader} read the prompt in ${seconds(timings.prefill_s)}`;
  const moved = timings.prefill_worker !== "" && timings.kv_bytes > 0;
  const early = `${share(timings.kv_bytes_before_prefill_ended / timings.kv_bytes)} of ${bytes(timings.kv_bytes)}`;
  const until = seconds(first - arrived);
  return {
    end,
    first,
    ticks,
    bars: [
      { lane: "queue", from: 0, to: bound, kind: "queue", words: `waited ${seconds(timings.queue_s)} for a worker` },
      { lane: "prefill", from: bound, to: read, kind: "prefill", words: reading },
      ...(moved
        ? [
            { lane: "KV transfer", from: bound, to: read, kind: "early", words: `${early} while the prompt was read` },
            { lane: "KV transfer", from: read, to: arrived, kind: "late", words: `the rest within ${seconds(timings.transfer_s)}` },
          ]
        : []),
      { lane: "first token", from: arrived, to: first, kind: "first", words: `${until} until ${timings.decode_worker} had the first token` },
      { lane: "tokens", from: first, to: end, kind: "decode", words: `${seconds(end - first)} of tokens, TPOT ${seconds(timings.tpot_s)}` },
    ],
  };
}

// An element with the picture and the same in words. `objective_s`: for the first token, or null.
export function timeline(timings, tokens, usage, objective_s) {
  const made = lanes(timings, tokens);
  const end = Math.max(made.end, objective_s !== null && objective_s < made.end * 1.5 ? objective_s : 0) || 0.001;
  const x = (at) => LEFT + (at / end) * (WIDTH - LEFT - RIGHT);
  const names = [...new Set(made.bars.map((bar) => bar.lane))];
  const height = names.length * LANE + AXIS;
  const y = (lane) => names.indexOf(lane) * LANE;
  const bars = made.bars.map((bar) =>
    s(
      "rect",
      { x: x(bar.from), y: y(bar.lane) + 5, width: Math.max(1, x(bar.to) - x(bar.from)), height: LANE - 10, rx: 2, class: `bar ${bar.kind}` },
      s("title", {}, bar.words),
    ),
  );
  const every = Math.ceil(made.ticks.length / MOST_TICKS) || 1;
  const ticks = made.ticks
    .filter((_, at) => at % every === 0)
    .map((at) => s("line", { x1: x(at), x2: x(at), y1: y("tokens") + 3, y2: y("tokens") + LANE - 3, class: "token" }));
  const labels = names.map((name) => s("text", { x: LEFT - 8, y: y(name) + LANE / 2 + 4, "text-anchor": "end" }, name));
  const limit = (at) =>
    s(
      "line",
      { x1: x(at), x2: x(at), y1: 0, y2: names.length * LANE, class: "objective" },
      s("title", {}, `TTFT objective ${seconds(at)}`),
    );
  const limits = objective_s === null || objective_s > end ? [] : [limit(objective_s)];
  const axis = [0, 0.25, 0.5, 0.75, 1].map((part) =>
    s("text", { x: x(part * end), y: height - 6, "text-anchor": part === 1 ? "end" : part ? "middle" : "start" }, seconds(part * end)),
  );
  const words = made.bars.map((bar) => bar.words).join("; ");
  return h(
    "figure",
    { class: "timeline" },
    h("figcaption", {}, h("span", { class: "name" }, "Timeline of this request")),
    h(
      "div",
      { class: "wide", tabindex: "0", role: "region", "aria-label": "Timeline" },
      s(
        "svg",
        { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": words },
        ...labels,
        ...bars,
        ...ticks,
        ...limits,
        ...axis,
      ),
    ),
    figures(timings, usage),
  );
}

function figures(timings, usage) {
  const route = timings.prefill_worker ? `${timings.prefill_worker} → ${timings.decode_worker}` : timings.decode_worker;
  const early = timings.kv_bytes ? `, ${share(timings.kv_bytes_before_prefill_ended / timings.kv_bytes)} before prefill ended` : "";
  const said = [
    ["route", route],
    ["tokens", `${count(usage.promptTokens)} in, ${count(usage.tokens)} out`],
    ["queue", seconds(timings.queue_s)],
    ["prefill", seconds(timings.prefill_s)],
    ["transfer, uncovered", seconds(timings.transfer_s)],
    ["TTFT", seconds(timings.ttft_s)],
    ["TPOT", seconds(timings.tpot_s)],
    ["KV moved", `${bytes(timings.kv_bytes)}${early}`],
    ["attempts", count(timings.attempts)],
  ];
  return h("dl", { class: "figures" }, ...said.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}
