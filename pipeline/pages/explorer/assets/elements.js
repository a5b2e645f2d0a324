// Making elements: texts of models enter the page as text nodes only.

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) node.append(child instanceof Node ? child : String(child));
  }
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const link = (changes, attributes, ...children) =>
  el("a", { href: address(changes), "data-key": JSON.stringify(changes), ...attributes }, children);

// A question to the service that sent this page; one with a body by POST.
async function ask(path, body) {
  const reply = await fetch(path, body && { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
  const said = await reply.json();
  if (!reply.ok) throw new Error(said.error.message);
  return said;
}

const title = (text) => el("h2", { tabindex: "-1" }, text);
const percent = (x, digits = 1) => (x === null ? "\u2013" : fixed(100 * x, digits) + " %");
const signed = (x, digits = 3) => (x < 0 ? MINUS : "+") + Math.abs(x).toFixed(digits);
const fixed = (x, digits = 3) =>
  x === null || x === undefined ? "\u2013" : x < 0 ? MINUS + Math.abs(x).toFixed(digits) : x.toFixed(digits);
const hue = (code) => `hsl(${((code * 137.508) % 360).toFixed(0)} 70% ${DARK.matches ? 62 : 42}%)`;

// Controls and direction marks of hostile texts would move or hide what stands beside them.
function printable(text) {
  const plain = text.replace(/\n/g, "\u23ce").replace(/\t/g, "\u21e5");
  return plain.replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g, "\ufffd") || "\u2205";
}
const word = (data, token) => printable(data.vocabulary[token]);
const seenWords = (data, tokens) => tokens.map((t) => word(data, t)).join(" ");
const words = (data, tokens) => el("span", { class: "text" }, seenWords(data, tokens));
const chips = (data, tokens) => tokens.map((t, i) => [i ? " " : "", el("span", { class: "text chip" }, word(data, t))]);
const codeLink = (code, changes = {}) =>
  link({ view: "codes", code, rollout: null, ...changes }, { class: "code", "--hue": hue(code), "aria-label": `code ${code}` }, code);
const codesInLine = (codes) => codes.map((code, i) => [i ? " " : "", codeLink(code)]);

function bar(value, most, ink = "var(--accent)") {
  const size = most > 0 ? Math.min(1, Math.abs(value) / most) : 0;
  return el("span", { class: "bar", "aria-hidden": "true" }, el("i", { "--from": "0%", "--size": `${100 * size}%`, "--ink": ink }));
}

function middleBar(value, most) {
  const size = most > 0 ? (50 * Math.min(most, Math.abs(value))) / most : 0;
  const from = value < 0 ? 50 - size : 50;
  return el(
    "span",
    { class: "bar", "aria-hidden": "true" },
    el("i", { "--from": `${from}%`, "--size": `${size}%`, "--ink": value < 0 ? "var(--down)" : "var(--up)" }),
  );
}

// Many small buttons as one stop of the Tab key: the arrows, Home and End move among them.
function strip(label, children, current = 0) {
  const node = el("div", { class: "tokens", role: "group", "aria-label": label }, children);
  const stops = [...node.querySelectorAll("button:not(:disabled)")];
  const stopAt = (i) => stops.forEach((stop, j) => stop.setAttribute("tabindex", i === j ? "0" : "-1"));
  stopAt(Math.max(0, Math.min(stops.length - 1, current)));
  node.addEventListener("keydown", (event) => {
    const here = stops.indexOf(document.activeElement),
      moves = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: stops.length - 1 };
    if (here < 0 || !(event.key in moves) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const next = Math.max(0, Math.min(stops.length - 1, moves[event.key]));
    stopAt(next);
    stops[next].focus();
  });
  return node;
}

const tiles = (pairs) =>
  el(
    "dl",
    { class: "tiles" },
    pairs.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
  );
const scrolling = (name, node) => el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": name }, node);

// Columns: {name, cell(row), value(row) to sort by, number: true, wide: true}. Starts sorted by column `sort`, largest first.
function table(caption, columns, rows, { sort = null, chosen = () => false } = {}) {
  const body = el("tbody", {});
  const heads = columns.map((column, i) => {
    const button = column.value && el("button", { type: "button", onclick: () => order(i) }, column.name);
    return el("th", { scope: "col", class: column.number && "number" }, button || column.name);
  });
  let by = null,
    down = true;
  function order(i) {
    down = by === i ? !down : true;
    by = i;
    heads.forEach((head, j) =>
      j === i ? head.setAttribute("aria-sort", down ? "descending" : "ascending") : head.removeAttribute("aria-sort"),
    );
    const value = columns[i].value;
    show([...rows].sort((a, b) => (down ? 1 : -1) * compare(value(b), value(a))));
  }
  function show(sorted) {
    body.replaceChildren(
      ...sorted.map((row) =>
        el(
          "tr",
          { class: chosen(row) && "chosen" },
          columns.map((c) => el("td", { class: c.number ? "number" : c.wide && "wide" }, c.cell(row))),
        ),
      ),
    );
  }
  if (sort === null) show(rows);
  else order(sort);
  return scrolling(caption, el("table", {}, el("caption", {}, el("span", {}, caption)), el("thead", {}, el("tr", {}, heads)), body));
}
const compare = (a, b) => (typeof a === "string" ? -a.localeCompare(b) : (a ?? -Infinity) - (b ?? -Infinity) || 0);
