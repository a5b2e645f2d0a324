// Sections of a report, as pipeline/pages/records.py has them, on any page.

// What both texts share at their ends is soft.
function apart(own, other) {
  let from = 0, end = 0;
  while (from < Math.min(own.length, other.length) && own[from] === other[from]) from++;
  while (end < Math.min(own.length, other.length) - from && own.at(-1 - end) === other.at(-1 - end)) end++;
  const cut = own.length - end, part = (text, kind) => text && texts(text, kind);
  return [part(own.slice(0, from), "soft"), part(own.slice(from, cut), "apart"), part(own.slice(cut), "soft")];
}

// An interval on a scale that all rows share.
function whisker({ value, low, high, from, to }) {
  const at = (x) => `${(100 * (x - from)) / (to - from || 1)}%`;
  const zero = from < 0 && to > 0 && el("s", { "--from": at(0) });
  return el("span", { class: "whisker", "aria-hidden": "true" }, zero, el("i", { "--from": at(low), "--to": at(high) }), el("b", { "--from": at(value) }));
}

const cellOf = (cell) => (typeof cell === "string" ? plain(cell) : "low" in cell ? whisker(cell) : "beside" in cell ? apart(cell.text, cell.beside) : el("a", { href: cell.target }, plain(cell.text)));
const sortable = (cell) => (typeof cell !== "string" ? 0 : Number.parseFloat(cell.replace(/,/g, "").replace(MINUS, "-")) || (/\d/.test(cell) ? 0 : -Infinity));

function tableOf({ title, head, rows, note }) {
  const long = (i) => rows.some((row) => typeof row[i] !== "string" ? "beside" in row[i] : row[i].length > 60);
  const columns = head.map((name, i) => ({
    name: plain(name), head: i === 0, cell: (row) => cellOf(row[i]),
    ...(i > 0 && (head.length > 2 && !long(i) ? { number: true, ...(rows.length > 1 && { value: (row) => sortable(row[i]) }) } : { wide: true })),
  }));
  return [table(plain(title), columns, rows), note && soft(plain(note))];
}

const block = (name, text) => el("pre", { class: "scroll", tabindex: "0", role: "region", "aria-label": name }, el("code", {}, plain(text)));

const answers = ({ prompt_id: id, prompt, answers: given }) =>
  el("article", { class: "panel", "aria-label": `prompt ${plain(id)}` }, soft(plain(id)), el("p", { class: "text" }, plain(prompt)),
    el("dl", { class: "answers" }, given.map(([name, text, good]) =>
      el("div", {}, el("dt", {}, plain(name), " ", verdictOf(good, good ? "solves it" : "fails")), el("dd", { class: "text" }, plain(text) || "(nothing)")))));

const sectionOf = (s) => [
  s.warnings.map((text) => note(plain(text))),
  s.lines.map((text) => p(plain(text))),
  s.figures.length > 0 && side(s.figures.map(chart)),
  s.tables.map(tableOf),
  s.pictures.map((one) => el("img", { src: one.source, alt: one.words })),
  s.galleries.map(({ title, total, examples }) => [
    el("h3", {}, plain(title)),
    soft(`${total} prompts${examples.length < total ? `, ${examples.length} of them shown` : ""}.`),
    examples.map(answers),
  ]),
  s.commands.map(([about, command]) => [p(`${about}:`), block("commands", command)]),
  s.links.length > 0 && el("ul", {}, s.links.map((l) => el("li", {}, el("a", { href: l.target }, plain(l.text)), `: ${plain(l.about)}`))),
  s.files.map(([name, text]) => folded(name, () => block(name, text))),
];
