// A line chart of the last minutes: lines, an objective, and a crosshair that pointer and arrow keys move.

import { h, s, setText } from "./dom.js";
import { SPAN_S } from "./history.js";

const USUAL_WIDTH = 520; // until it is laid out
const SPANS_S = [60, 120, 300, SPAN_S];
const HEIGHT = 148;
const PAD = { left: 52, right: 10, top: 8, bottom: 20 };
const GAP_S = 6; // a line is broken where nothing came for longer

export class Chart {
  // `lines`: [{name, tone}]. `format` writes a value. `most`: the scale's end where it is fixed, `least` what it is at
  // least.
  constructor(title, lines, format, { most = null, least = 0 } = {}) {
    this.title = title;
    this.lines = lines;
    this.format = format;
    this.most = most;
    this.least = least;
    this.cursor = null; // seconds before now
    this.svg = s("svg", {
      role: "img",
      tabindex: "0",
      class: "chart",
      onkeydown: (event) => this.#key(event),
      onpointermove: (event) => this.#point(event),
      onpointerleave: () => this.#move(null),
      onblur: () => this.#move(null),
    });
    this.values = lines.map((line) => h("b", { class: "value" }));
    this.when = h("span", { class: "soft when" });
    const legend = lines.map((line, at) =>
      h("span", { class: "key" }, h("i", { class: `swatch ${line.tone}` }), line.name, " ", this.values[at]),
    );
    this.objectiveKey = h("span", { class: "key" }, h("i", { class: "swatch objective" }), "objective ", h("b"));
    new ResizeObserver(() => this.series && this.#draw()).observe(this.svg);
    this.element = h(
      "figure",
      {},
      h("figcaption", {}, h("span", { class: "name" }, title), this.when),
      this.svg,
      h("div", { class: "legend" }, ...legend, this.objectiveKey),
    );
  }

  // `series`: for each line [[at, value or null], ...]; `now` on the same clock. `said` is the objective in words, if
  // there is more to it than the line that is drawn.
  show(series, now, objective = null, said = "") {
    Object.assign(this, { series, now, objective, said });
    const seen = now - Math.min(now, ...series.map((points) => points[0]?.[0] ?? now));
    this.span = SPANS_S.find((span) => span >= seen) ?? SPAN_S;
    this.#draw();
  }

  // A unit of the drawing is a pixel, so that its words have the page's size.
  get #width() {
    return this.svg.clientWidth || USUAL_WIDTH;
  }

  #draw() {
    const top = this.#top();
    const width = this.#width;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const x = (at) => PAD.left + (1 - (this.now - at) / this.span) * (width - PAD.left - PAD.right);
    const y = (value) => HEIGHT - PAD.bottom - (Math.min(value, top) / top) * (HEIGHT - PAD.top - PAD.bottom);
    const at = this.cursor === null ? null : this.now - this.cursor;
    const shown = this.series.map((points) => (at === null ? points.at(-1)?.[1] : nearest(points, at)) ?? null);
    this.svg.replaceChildren(
      ...this.#grid(top, y, width),
      ...this.series.map((points, n) => s("path", { d: path(points, x, y), class: `line ${this.lines[n].tone}` })),
      ...(this.objective === null || this.objective > top
        ? []
        : [s("line", { x1: PAD.left, x2: width - PAD.right, y1: y(this.objective), y2: y(this.objective), class: "objective" })]),
      ...(at === null ? [] : [s("line", { x1: x(at), x2: x(at), y1: PAD.top, y2: HEIGHT - PAD.bottom, class: "cursor" })]),
    );
    shown.forEach((value, n) => setText(this.values[n], value === null ? "–" : this.format(value)));
    setText(this.when, at === null ? "" : `${Math.round(this.cursor)} s ago`);
    this.objectiveKey.hidden = this.objective === null;
    if (this.objective !== null) setText(this.objectiveKey.lastChild, this.said || this.format(this.objective));
    this.svg.setAttribute("aria-label", this.#words(shown));
  }

  #top() {
    if (this.most !== null) return this.most;
    const values = this.series.flat().map(([, value]) => value ?? 0);
    const highest = Math.max(0, ...values);
    // The objective is in the picture unless everything is far below it.
    const asked = this.objective !== null && (highest === 0 || this.objective < highest * 6) ? this.objective : 0;
    return nice(Math.max(Math.max(highest, asked) * 1.08, this.least) || 1);
  }

  #grid(top, y, width) {
    const heights = [0, 0.5, 1].map((part) => part * top);
    const text = (x, height, anchor, words) => s("text", { x, y: height, "text-anchor": anchor }, words);
    return [
      ...heights.map((value) => s("line", { x1: PAD.left, x2: width - PAD.right, y1: y(value), y2: y(value), class: "grid" })),
      ...heights.map((value) => text(PAD.left - 6, y(value) + 4, "end", this.format(value))),
      text(PAD.left, HEIGHT - 4, "start", `${this.span / 60} min ago`),
      text(width - PAD.right, HEIGHT - 4, "end", "now"),
    ];
  }

  #words(shown) {
    const parts = this.lines.map((line, n) => `${line.name} ${shown[n] === null ? "none" : this.format(shown[n])}`);
    const goal = this.objective === null ? "" : `, objective ${this.said || this.format(this.objective)}`;
    const when = this.cursor === null ? "now" : `${Math.round(this.cursor)} seconds ago`;
    return `${this.title}, ${when}: ${parts.join(", ")}${goal}`;
  }

  #point(event) {
    const box = this.svg.getBoundingClientRect();
    const back = (1 - (event.clientX - box.left - PAD.left) / (box.width - PAD.left - PAD.right)) * this.span;
    this.#move(back < 0 || back > this.span ? null : back);
  }

  #key(event) {
    const steps = { ArrowLeft: 5, ArrowRight: -5 };
    if (event.key === "Escape") this.#move(null);
    if (!(event.key in steps)) return;
    event.preventDefault();
    this.#move(Math.min(this.span, Math.max(0, (this.cursor ?? 0) + steps[event.key])));
  }

  #move(cursor) {
    this.cursor = cursor;
    if (this.series) this.#draw();
  }
}

function path(points, x, y) {
  let drawn = "";
  let before = null;
  for (const [at, value] of points) {
    if (value === null) {
      before = null;
      continue;
    }
    drawn += `${before !== null && at - before <= GAP_S ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
    before = at;
  }
  return drawn;
}

function nearest(points, at) {
  let best = null;
  for (const point of points) {
    if (best === null || Math.abs(point[0] - at) < Math.abs(best[0] - at)) best = point;
  }
  return best !== null && Math.abs(best[0] - at) <= GAP_S ? best[1] : null;
}

// The next of 1, 2, 4 times a power of ten: half of it is written as shortly.
function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 10].map((step) => step * power).find((step) => step >= value);
}
