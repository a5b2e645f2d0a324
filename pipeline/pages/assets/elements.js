"use strict";
// What all pages share. Texts of models enter a page as text nodes only.

const DARK = matchMedia("(prefers-color-scheme: dark)"), MINUS = "\u2212", NONE = "\u2013";
const LIVE = "live" in document.body.dataset; // sent by a service, which answers what the page does not hold
const $ = (id) => document.getElementById(id);
const onPage = () => JSON.parse($("data").textContent);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...nodes(children));
  return node;
}
const nodes = (...children) => children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const put = (id, ...children) => $(id)?.replaceChildren(...nodes(children));
const link = (changes, attributes, ...children) => el("a", { href: address(changes), "data-key": JSON.stringify(changes), ...attributes }, children);
const p = (...children) => el("p", {}, children);
const soft = (...children) => el("p", { class: "soft" }, children);
const note = (text) => el("p", { class: "note" }, text);
const side = (...children) => el("div", { class: "columns" }, children);
const title = (text) => el("h2", { tabindex: "-1" }, text);
const panel = (name, ...children) => el("section", { class: "panel", "aria-label": name }, children);
const choose = (label, options, value, attributes) =>
  el("label", {}, label, el("select", attributes, options.map(([v, text]) => el("option", { value: v, selected: String(v) === String(value ?? "") }, text))));

// All that is chosen is in the address, so that any view can be linked to: each page says what it has REMEMBERED.
const chosen = (name) => new URLSearchParams(location.hash.slice(1)).get(name) ?? "";
function address(changes) {
  const away = window.leadsTo?.(changes);
  if (away) return away;
  const next = new URLSearchParams();
  for (const name of REMEMBERED) {
    const value = name in changes ? changes[name] : chosen(name);
    if (value !== null && value !== undefined && value !== "") next.set(name, value);
  }
  return "#" + next.toString();
}
const go = (changes) => (location.hash = address(changes));

// A question to the service that sent this page; one with a body by POST.
async function ask(path, body) {
  const reply = await fetch(path, body && { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
  const said = await reply.json();
  if (!reply.ok) throw new Error(said.error.message);
  return said;
}
function trouble(error) {
  $("problem").textContent = error ? printable(error.message) : "";
  $("problem").hidden = !error;
}
$("skip").addEventListener("click", (event) => {
  event.preventDefault();
  document.querySelector($("skip").getAttribute("href")).focus();
});

const minus = (x, digits) => x < 0 && Number(x.toFixed(digits)) !== 0; // no sign before what is shown as 0
const fixed = (x, digits = 3) => (x === null || x === undefined ? NONE : (minus(x, digits) ? MINUS : "") + Math.abs(x).toFixed(digits));
const percent = (x, digits = 1) => (x === null ? NONE : fixed(100 * x, digits) + " %");
const signed = (x, digits = 3) => (minus(x, digits) ? MINUS : "+") + Math.abs(x).toFixed(digits);
const spanOf = ({ low, high }, digits) => `${signed(low, digits)} to ${signed(high, digits)}`;
const hue = (code) => `hsl(${((code * 137.508) % 360).toFixed(0)} 70% ${DARK.matches ? 62 : 42}%)`;

// Controls and direction marks of hostile texts would move or hide what stands beside them.
const plain = (text) => text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]/g, "\ufffd");
const printable = (text) => plain(text.replace(/\n/g, "\u23ce").replace(/\t/g, "\u21e5")) || "\u2205";
const texts = (text, kind = "") => el("span", { class: `text ${kind}` }, printable(text));
const word = (data, token) => printable(data.vocabulary[token]);
const seenWords = (data, tokens) => tokens.map((t) => word(data, t)).join(" ");
const words = (data, tokens) => el("span", { class: "text" }, seenWords(data, tokens));
const chips = (data, tokens) => tokens.map((t, i) => [i ? " " : "", el("span", { class: "text chip" }, word(data, t))]);
const verdictOf = (good, text) => el("span", { class: good ? "good" : "bad" }, text);
const codeLink = (code, changes = {}) =>
  link({ view: "codes", code, rollout: null, ...changes }, { class: "code", "--hue": hue(code), "aria-label": `code ${code}` }, code);
const codesInLine = (codes) => codes.map((code, i) => [i ? " " : "", codeLink(code)]);

// A token over its code; with `attributes` it is a button.
const tokenOf = (text, code, attributes, ...more) =>
  el(attributes ? "button" : "span", { type: attributes && "button", class: "token", "--hue": code === null ? "var(--line)" : hue(code), ...attributes },
    `${printable(text)} `, code !== null && el("small", {}, code), more);

const barOf = (from, size, ink) => el("span", { class: "bar", "aria-hidden": "true" }, el("i", { "--from": `${from}%`, "--size": `${size}%`, "--ink": ink }));
const bar = (value, most, ink = "var(--accent)") => barOf(0, most > 0 ? 100 * Math.min(1, Math.abs(value) / most) : 0, ink);
function middleBar(value, most) {
  const size = most > 0 ? (50 * Math.min(most, Math.abs(value))) / most : 0;
  return barOf(value < 0 ? 50 - size : 50, size, value < 0 ? "var(--down)" : "var(--up)");
}

// The arrows, Home and End as a place among `count`; null for other keys.
function moved(event, here, count, more = {}) {
  const moves = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: count - 1, ...more };
  if (!(event.key in moves) || event.ctrlKey || event.altKey || event.metaKey) return null;
  event.preventDefault();
  return typeof moves[event.key] === "number" ? Math.max(0, Math.min(count - 1, moves[event.key])) : moves[event.key];
}

// Many small buttons as one stop of the Tab key.
function strip(label, children, current = 0) {
  const node = el("div", { class: "tokens", role: "group", "aria-label": label }, children);
  const stops = [...node.querySelectorAll("button:not(:disabled)")];
  const stopAt = (i) => stops.forEach((stop, j) => stop.setAttribute("tabindex", i === j ? "0" : "-1"));
  stopAt(Math.max(0, Math.min(stops.length - 1, current)));
  node.addEventListener("keydown", (event) => {
    const here = stops.indexOf(document.activeElement), next = here < 0 ? null : moved(event, here, stops.length);
    if (next === null) return;
    stopAt(next);
    stops[next].focus();
  });
  return node;
}

const tiles = (pairs) => el("dl", { class: "tiles" }, pairs.map(([name, value, mood]) => el("div", {}, el("dt", {}, name), el("dd", { class: mood }, value))));
const scrolling = (name, node) => el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": name }, node);
// What is folded away, made when it is opened.
function folded(name, make) {
  const node = el("details", { ontoggle: () => node.open && node.childNodes.length === 1 && fill(node, {}, [make()]) }, el("summary", {}, name));
  return node;
}

// Columns: {name, cell(row), value(row) to sort by, number: true, wide: true, head: true}. Starts sorted by column `sort`, largest first.
function table(caption, columns, rows, { sort = null, chosen = () => false } = {}) {
  const body = el("tbody", {});
  const heads = columns.map((column, i) =>
    el("th", { scope: "col", class: column.number && "number" }, column.value ? el("button", { type: "button", onclick: () => order(i) }, column.name) : column.name));
  let by = null, down = true;
  function order(i) {
    down = by === i ? !down : true;
    by = i;
    heads.forEach((head, j) => (j === i ? head.setAttribute("aria-sort", down ? "descending" : "ascending") : head.removeAttribute("aria-sort")));
    const { value } = columns[i];
    show([...rows].sort((a, b) => (down ? 1 : -1) * compare(value(b), value(a))));
  }
  const cell = (c, row) => el(c.head ? "th" : "td", { scope: c.head && "row", class: c.number ? "number" : c.wide && "wide" }, c.cell(row));
  const show = (sorted) => body.replaceChildren(...sorted.map((row) => el("tr", { class: chosen(row) && "chosen" }, columns.map((c) => cell(c, row)))));
  if (sort === null) show(rows);
  else order(sort);
  return scrolling(caption, el("table", {}, el("caption", {}, el("span", {}, caption)), el("thead", {}, el("tr", {}, heads)), body));
}
const compare = (a, b) => (typeof a === "string" ? -a.localeCompare(b) : (a ?? -Infinity) - (b ?? -Infinity) || 0);
// A column of numbers that sorts: `value(row)` shown by `show`.
const num = (name, value, show = fixed) => ({ name, number: true, value, cell: (row) => show(value(row)) });
