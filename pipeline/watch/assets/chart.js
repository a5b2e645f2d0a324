// Curves with bands and stacked bars, as SVG: a readout follows the pointer, or the arrow keys.

const PAPER = { width: 460, height: 190, left: 46, right: 452, top: 12 };

// Round numbers (1, 2 or 5 times a power of ten apart) that cover low to high, at most `most` steps.
function ticks(low, high, most = 5) {
  if (!(high > low)) [low, high] = [low - (Math.abs(low) / 2 || 0.5), low + (Math.abs(low) / 2 || 0.5)];
  const power = 10 ** Math.floor(Math.log10((high - low) / most));
  const steps = (step) => Math.ceil(high / step - 1e-9) - Math.floor(low / step + 1e-9);
  const step = [1, 2, 5, 10, 20].map((factor) => factor * power).find((one) => steps(one) <= most);
  return Array.from({ length: steps(step) + 1 }, (_, i) => (Math.floor(low / step + 1e-9) + i) * step);
}
const short = (x) => (Number.isFinite(x) ? String(Number(x.toPrecision(4))).replace("-", MINUS) : "\u2013");
const scale = (low, high, from, to) => (x) => from + ((x - low) / (high - low || 1)) * (to - from);

function frame(xs, up, across) {
  const { left, right, top, height } = PAPER;
  const marks = ticks(up[0], up[1]);
  const y = scale(marks[0], marks.at(-1), height, top);
  const x = scale(xs[0], xs.at(-1), left, right);
  const parts = marks.flatMap((mark) => [
    svg("line", { class: "grid", x1: left, x2: right, y1: y(mark), y2: y(mark) }),
    svg("text", { class: "end", x: left - 5, y: y(mark) + 4 }, short(mark)),
  ]);
  const ends = xs.length > 1 ? [[xs[0], "start"], [xs.at(-1), "end"]] : [[xs[0], "middle"]];
  for (const [at, anchor] of ends) parts.push(svg("text", { class: anchor, x: xs.length > 1 ? x(at) : (left + right) / 2, y: height + 16 }, short(at)));
  parts.push(svg("text", { class: "middle", x: (left + right) / 2, y: height + 16 }, across));
  return { x: xs.length > 1 ? x : () => (left + right) / 2, y, parts };
}

// A figure with `said(i)` about place i of `xs`, told to the pointer and to the arrow keys.
function readable({ title, note, words, xs, x, parts, said }) {
  const out = el("output", {}, words);
  const cursor = svg("line", { class: "cursor", y1: PAPER.top, y2: PAPER.height, visibility: "hidden" });
  const picture = svg("svg", { class: "live", viewBox: `0 0 ${PAPER.width} ${PAPER.height + 24}`, "aria-hidden": "true" }, parts, cursor);
  let here = xs.length - 1;
  function point(i) {
    here = Math.max(0, Math.min(xs.length - 1, i));
    cursor.setAttribute("x1", x(xs[here]));
    cursor.setAttribute("x2", x(xs[here]));
    cursor.setAttribute("visibility", "visible");
    out.textContent = said(here);
  }
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * PAPER.width;
    point(xs.reduce((best, one, i) => (Math.abs(x(one) - at) < Math.abs(x(xs[best]) - at) ? i : best), 0));
  });
  const reader = el("div", {
    class: "reader",
    tabindex: "0",
    role: "group",
    "aria-label": `${title}: arrow keys read the values`,
    onkeydown: (event) => {
      const moves = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: xs.length - 1 };
      if (!(event.key in moves) || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      point(moves[event.key]);
    },
  }, picture);
  return el("figure", {}, el("figcaption", {}, el("strong", {}, title)), reader, out, note && el("details", {}, el("summary", {}, "what it shows"), el("p", { class: "soft" }, note)));
}

const legend = (names) =>
  el("p", { class: "legend" }, names.map((name, i) => el("span", {}, el("i", { class: `ink i${i}`, "aria-hidden": "true" }), name)));

// `figure`: title, across, note, curves of name, x, y, low, high, raw and joined, as the report has them.
function curvesFigure(figure) {
  const finite = (values) => values.filter((v) => v !== null && Number.isFinite(v));
  const all = figure.curves.flatMap((c) => finite([...c.y, ...c.low, ...c.high, ...c.raw.map(([, y]) => y)]));
  const xs = [...new Set(figure.curves.flatMap((c) => c.x))].sort((a, b) => a - b);
  const { x, y, parts } = frame(xs, [Math.min(...all), Math.max(...all)], figure.across);
  const path = (points) => points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ");
  figure.curves.forEach((curve, i) => {
    const known = curve.x.map((_, j) => j).filter((j) => curve.low.length && finite([curve.low[j], curve.high[j]]).length === 2);
    for (const [a, b] of curve.raw) if (b !== null) parts.push(svg("circle", { class: `raw i${i}`, cx: x(a), cy: y(b), r: 1.2 }));
    if (curve.joined) {
      const edge = [...known.map((j) => [curve.x[j], curve.high[j]]), ...known.reverse().map((j) => [curve.x[j], curve.low[j]])];
      if (edge.length) parts.push(svg("polygon", { class: `band i${i}`, points: path(edge) }));
      parts.push(svg("polyline", { class: `i${i}`, points: path(curve.x.map((a, j) => [a, curve.y[j]]).filter(([, b]) => b !== null)) }));
      return;
    }
    for (const j of known) parts.push(svg("line", { class: `i${i}`, x1: x(curve.x[j]), x2: x(curve.x[j]), y1: y(curve.low[j]), y2: y(curve.high[j]) }));
    curve.x.forEach((a, j) => parts.push(svg("circle", { class: `mark i${i}`, cx: x(a), cy: y(curve.y[j]), r: 3 })));
  });
  const told = (curve, j) =>
    `${curve.name} ${short(curve.y[j])}` + (curve.low.length && Number.isFinite(curve.low[j] ?? NaN) ? ` (${short(curve.low[j])} to ${short(curve.high[j])})` : "");
  const said = (i) =>
    `${figure.across} ${short(xs[i])}: ` + figure.curves.filter((c) => c.x.includes(xs[i])).map((c) => told(c, c.x.indexOf(xs[i]))).join(", ");
  const node = readable({ title: figure.title, note: figure.note && `${figure.note}.`, words: said(xs.length - 1), xs, x, parts, said });
  if (figure.curves.length > 1) node.insertBefore(legend(figure.curves.map((c) => c.name)), node.querySelector("output"));
  return node;
}

// `spent`: stage, updates, parts and totals, as `pipeline/watch/time_spent.py` has them.
function timeFigure(spent) {
  const names = Object.keys(spent.parts);
  const sums = spent.updates.map((_, i) => names.reduce((sum, name) => sum + spent.parts[name][i], 0));
  const places = spent.updates.map((_, i) => i);
  const { y, parts } = frame(spent.updates, [0, Math.max(...sums, 1e-9)], "update");
  const wide = (PAPER.right - PAPER.left) / places.length;
  const x = (i) => PAPER.left + (i + 0.5) * wide;
  for (const i of places) {
    let below = 0;
    names.forEach((name, k) => {
      const value = spent.parts[name][i];
      if (value > 0)
        parts.push(svg("rect", { class: `fill i${k}`, x: x(i) - 0.42 * wide, width: 0.84 * wide, y: y(below + value), height: Math.max(0, y(below) - y(below + value)) }));
      below += value;
    });
  }
  const said = (i) =>
    `up to update ${spent.updates[i]}: ${short(sums[i])} s an update; ` +
    names.filter((name) => spent.parts[name][i] > 0).map((name) => `${name} ${short(spent.parts[name][i])} s`).join(", ");
  const note = "Seconds of an update by the driver's clock, each bar the mean of neighbouring updates. idle: an asynchronous learner waits for rollouts; other: what is not measured by itself.";
  const node = readable({ title: `Seconds of an update: ${spent.stage}`, note, words: said(places.length - 1), xs: places, x, parts, said });
  node.insertBefore(legend(names), node.querySelector("output"));
  return node;
}
