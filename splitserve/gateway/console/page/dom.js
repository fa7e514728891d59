// Elements without HTML strings: whatever comes from the cluster is text.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
export const s = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
export const byId = (id) => document.getElementById(id);

// Text that has not changed is left alone: a selection in it stays, a screen reader is not told again.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function setOptions(select, names) {
  const there = [...select.options].map((option) => option.value);
  if (there.length === names.length && there.every((name, at) => name === names[at])) return;
  const chosen = select.value;
  select.replaceChildren(...names.map((name) => h("option", { value: name }, name)));
  if (names.includes(chosen)) select.value = chosen;
}

// One row per item, in their order. Rows keep their identity by key, so that a selection outlives a refresh.
export class Rows {
  constructor(body, width, cells) {
    this.body = body;
    this.width = width;
    this.cells = cells; // (item) => [{text, class, node, title}, ...]
    this.rows = new Map();
  }

  show(items, keyOf, empty) {
    const kept = new Set();
    let before = null;
    for (const item of items) {
      const key = keyOf(item);
      kept.add(key);
      let row = this.rows.get(key);
      if (!row) this.rows.set(key, (row = h("tr")));
      this.#fill(row, this.cells(item), item);
      const place = before ? before.nextSibling : this.body.firstChild;
      if (place !== row) this.body.insertBefore(row, place);
      before = row;
    }
    for (const [key, row] of this.rows) {
      if (!kept.has(key)) {
        row.remove();
        this.rows.delete(key);
      }
    }
    this.#sayEmpty(items.length === 0 ? empty : null);
  }

  #fill(row, cells, item) {
    row.className = item.rowClass ?? "";
    cells.forEach((cell, at) => {
      const td = row.children[at] ?? row.appendChild(at === 0 ? h("th", { scope: "row" }) : h("td"));
      if (td.className !== (cell.class ?? "")) td.className = cell.class ?? "";
      if (cell.title !== undefined && td.title !== cell.title) td.title = cell.title;
      if (cell.draw) cell.draw(td);
      else setText(td, cell.text);
    });
  }

  #sayEmpty(sentence) {
    if (!sentence) {
      this.empty?.remove();
      this.empty = null;
      return;
    }
    if (!this.empty) {
      this.empty = h("tr", { class: "empty" }, h("td", { colspan: this.width }));
    }
    setText(this.empty.firstChild, sentence);
    this.body.append(this.empty);
  }
}
