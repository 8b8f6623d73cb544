// Elements and formats. Text from logs only ever becomes text nodes.

/** An element with attributes and children; strings become text, null and false nothing. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === false) continue;
    element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== false));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Put text into an element, if it is another than it has. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
export const NONE = "–";

const known = (value) => value !== null && value !== undefined;
export const whole = (value) => (known(value) ? WHOLE.format(value) : NONE);
export const fixed = (value, digits) => (known(value) ? value.toFixed(digits) : NONE);
export const percent = (value, digits = 1) => (known(value) ? `${(100 * value).toFixed(digits)} %` : NONE);

/** Dollars with as many digits as say something. */
export const dollars = (value) => (known(value) ? `$${value >= 100 ? WHOLE.format(value) : value >= 1 ? value.toFixed(2)
  : value.toPrecision(2)}` : NONE);

const SCALES = [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

/** With a prefix of thousands: 1.07 M. */
export function scaled(value, unit = "") {
  if (!known(value)) return NONE;
  const [size, prefix] = SCALES.find(([from]) => Math.abs(value) >= from) ?? [1, ""];
  const digits = size === 1 ? 0 : Math.abs(value) / size >= 100 ? 0 : Math.abs(value) / size >= 10 ? 1 : 2;
  return `${(value / size).toFixed(digits)} ${prefix}${unit}`.trimEnd();
}

export const bytes = (value) => scaled(value, "B");

/** Seconds as 1:02:03 or 2:03. */
export function span(seconds) {
  if (!known(seconds)) return NONE;
  const all = Math.max(0, Math.floor(seconds));
  const [hours, minutes, rest] = [Math.floor(all / 3600), Math.floor(all / 60) % 60, all % 60];
  const two = (number) => String(number).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

/**
 * A table. `columns` are [heading, kind] with kind "text", "number", "name", "prose", "sign" or "bar"; `rows` are lists
 * of strings or nodes, the first cell of each is its heading. Roles are spelt out because a small screen shows rows of
 * prose as blocks, and a browser no longer takes what is laid out so for a table.
 */
export function table(caption, columns, rows) {
  const prose = columns.some(([, kind]) => kind === "prose");
  const head = columns.map(([heading, kind]) => el("th", { scope: "col", class: kind, role: "columnheader" }, heading));
  const body = rows.map((row) =>
    el("tr", { role: "row" }, ...row.map((cell, index) => {
      const [heading, kind] = columns[index];
      const label = prose && kind === "number" ? heading : null;
      return index === 0 ? el("th", { scope: "row", class: kind, role: "rowheader", "data-label": label }, cell)
        : el("td", { class: kind, role: "cell", "data-label": label }, cell);
    })));
  return el("table", { role: "table", class: prose ? "stacks" : null }, el("caption", { class: "unseen" }, caption),
    el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...head)),
    el("tbody", { role: "rowgroup" }, ...body));
}

/** A word with its mark: never a colour alone. */
export function mark(kind, symbol, word) {
  return el("span", { class: `mark ${kind}` }, el("span", { "aria-hidden": "true" }, symbol), ` ${word}`);
}

/** Make a select's options these [value, text], keeping what is chosen where it is still there. */
export function options(select, wanted) {
  const key = JSON.stringify(wanted);
  if (select.dataset.key === key) return;
  select.dataset.key = key;
  const chosen = select.value;
  select.replaceChildren(...wanted.map(([value, text]) => el("option", { value }, text)));
  if (wanted.some(([value]) => value === chosen)) select.value = chosen;
}
