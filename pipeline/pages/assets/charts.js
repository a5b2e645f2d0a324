// Curves with bands, marks with whiskers and bars, by uPlot: a readout follows the pointer or the arrow keys; dragging zooms (keys + and -),
// a double click or 0 shows all again; SVG, PNG, CSV and the same as a table.

const short = (x) => (Number.isFinite(x) ? String(Number(x.toPrecision(4))).replace("-", MINUS) : NONE);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const HIGH = 200, TABLED = 64;

// A `Figure` of pipeline/pages/records.py; `labels`: names of the places x; `stacked`: bars on each other.
function chart({ title: heading, across = "", note = "", labels = [], curves: drawn, stacked = false }) {
  const title = plain(heading), curves = drawn.map((c) => ({ ...c, name: plain(c.name) }));
  const xs = [...new Set(curves.flatMap((c) => c.x))].sort((a, b) => a - b), named = labels.length > 0;
  const place = (x) => (named ? labels[Math.round(x)] : short(x));
  const inked = curves.map((_, i) => css(`--i${i % 7}`)), edge = named ? 0.6 : 0;
  const ends = { min: xs[0] - edge, max: xs.at(-1) + edge };
  const { data, series, bands } = columns(xs, curves, inked, stacked);
  const heights = data.slice(1).flat().filter((y) => y !== null);
  const barred = curves.some((c) => c.kind === "bars");
  const range = uPlot.rangeNum(Math.min(barred ? 0 : Infinity, ...heights), Math.max(...heights), 0.1, true);
  const read = (i) => `${across} ${place(xs[i])}: ` + curves.map((c) => valueAt(c, xs[i])).filter(Boolean).join(", ");
  const out = el("output", {}, read(xs.length - 1));
  const box = el("div", { class: "reader", tabindex: "0", role: "group", "aria-label": `${title}: arrow keys read the values`, onkeydown: pressed });
  const axis = { stroke: css("--soft"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line") }, font: "11px system-ui" };
  const plot = new uPlot(
    {
      width: Math.min(460, innerWidth - 48), height: HIGH, series, bands, legend: { show: false },
      scales: { x: { time: false }, y: { range: () => range } },
      axes: [
        { ...axis, label: across, labelSize: 16, labelFont: axis.font, size: 26, values: (_, at) => at.map((x) => (named ? (labels[x] ?? "") : short(x))), ...(named && { incrs: [1, 2, 5, 10, 20, 50, 100] }) },
        { ...axis, size: 50, values: (_, at) => at.map(short) },
      ],
      cursor: { y: false, points: { show: false } },
      hooks: { setCursor: [(u) => u.cursor.idx !== null && u.cursor.idx !== undefined && tell(u.cursor.idx)], draw: [(u) => whiskers(u, curves, inked)] },
    },
    data,
    box,
  );
  if (named) plot.setScale("x", ends);
  new ResizeObserver(([entry]) => entry.contentRect.width > 60 && plot.setSize({ width: entry.contentRect.width, height: HIGH })).observe(box);
  let here = xs.length - 1;
  const tell = (i) => (out.textContent = read((here = i)));
  function zoomed(by) {
    const { min, max } = plot.scales.x, half = ((max - min) * by) / 2;
    plot.setScale("x", { min: Math.max(ends.min, xs[here] - half), max: Math.min(ends.max, xs[here] + half) });
  }
  function pressed(event) {
    const next = moved(event, here, xs.length, { "+": () => zoomed(0.5), "-": () => zoomed(2), 0: () => plot.setScale("x", ends) });
    if (next === null) return;
    if (typeof next === "function") return next();
    tell(next);
    plot.setCursor({ left: plot.valToPos(xs[here], "x"), top: 0 });
  }
  const rows = xs.map((x) => [place(x), ...curves.map((c) => c.y[c.x.indexOf(x)] ?? "")]);
  const csv = () => [[across || "x", ...curves.map((c) => c.name)], ...rows].map((row) => row.map((cell) => JSON.stringify(cell)).join(",")).join("\n");
  const kept = { SVG: () => file("svg", "image/svg+xml", picture(plot, title, curves, inked)), PNG: () => plot.ctx.canvas.toBlob((blob) => save(`${title}.png`, blob)), CSV: () => file("csv", "text/csv", csv()) };
  const file = (kind, type, text) => save(`${title}.${kind}`, new Blob([text], { type }));
  const tabled = () => table(title, [{ name: across, head: true, cell: (x) => place(x) }, ...curves.map((c) => ({ name: c.name, cell: (x) => valueAt(c, x, "") }))], xs.slice(0, TABLED));
  return el(
    "figure",
    {},
    el("figcaption", {}, el("strong", {}, title)),
    box,
    curves.length > 1 && el("p", { class: "legend" }, curves.map((c, i) => el("span", {}, el("i", { "--ink": inked[i], "aria-hidden": "true" }), c.name))),
    out,
    folded("about, table, SVG, PNG, CSV", () => [
      soft(note && `${plain(note)}. `, `The vertical axis begins at ${short(range[0])}.`),
      el("p", { class: "actions" }, Object.entries(kept).map(([name, keep]) => [el("button", { type: "button", onclick: keep }, name), " "])),
      tabled(),
      xs.length > TABLED && soft(`${xs.length - TABLED} more rows are in the CSV.`),
    ]),
  );
}

function valueAt(curve, x, name = `${curve.name} `) {
  const j = curve.x.indexOf(x);
  if (j < 0 || curve.y[j] === null) return "";
  return `${name}${short(curve.y[j])}` + (Number.isFinite(curve.low?.[j] ?? NaN) ? ` (${short(curve.low[j])} to ${short(curve.high[j])})` : "");
}

function columns(xs, curves, inked, stacked) {
  const data = [xs], series = [{}], bands = [];
  const add = (x, y, options) => {
    const at = new Map(x.map((one, j) => [one, y[j]]));
    data.push(xs.map((one) => at.get(one) ?? null));
    return series.push({ spanGaps: true, points: { show: false }, ...options }) - 1;
  };
  const bars = (fill) => ({ fill, width: 0, paths: uPlot.paths.bars({ size: [0.85] }) });
  const dots = (fill, size) => ({ paths: () => null, points: { show: true, size, width: 0, fill } });
  if (stacked) {
    const sums = curves.map((_, k) => xs.map((_x, i) => curves.slice(0, k + 1).reduce((sum, c) => sum + c.y[i], 0)));
    for (let k = curves.length - 1; k >= 0; k--) add(xs, sums[k], bars(inked[k]));
    return { data, series, bands };
  }
  curves.forEach((c, i) => {
    const line = (c.kind ?? "line") === "line";
    if (c.raw?.length) add(c.raw.map(([x]) => x), c.raw.map(([, y]) => y), dots(inked[i] + "66", 3));
    if (c.low?.length) {
      const hidden = { width: 0, ...(!line && { paths: () => null }) }, pair = [add(c.x, c.high, hidden), add(c.x, c.low, hidden)];
      if (line) bands.push({ series: pair, fill: inked[i] + "2e" });
    }
    add(c.x, c.y, line ? { stroke: inked[i], width: 2, dash: i ? [7, 3 * (i % 3)] : [] } : c.kind === "bars" ? bars(inked[i]) : dots(inked[i], 7));
  });
  return { data, series, bands };
}

// Of marks that no line joins.
function whiskers(u, curves, inked) {
  curves.forEach((c, i) => {
    if (c.kind !== "marks" || !c.low?.length) return;
    u.ctx.fillStyle = inked[i];
    c.x.forEach((x, j) => {
      const [at, low, high] = [u.valToPos(x, "x", true), u.valToPos(c.low[j], "y", true), u.valToPos(c.high[j], "y", true)];
      u.ctx.fillRect(at - 1, high, 2, low - high);
    });
  });
}

// The same as SVG: the canvas as it is scaled now, from the same numbers.
function picture(u, title, curves, inked) {
  const make = (tag, attributes, ...inner) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, inner);
  const x = (v) => u.valToPos(v, "x").toFixed(1), y = (v) => u.valToPos(v, "y").toFixed(1), { width, height } = u.bbox;
  const [w, h] = [width / uPlot.pxRatio, height / uPlot.pxRatio], known = (at, values) => at.flatMap((v, j) => (values[j] === null ? [] : [`${x(v)},${y(values[j])}`]));
  const ticks = u.axes.flatMap((axis, k) => (axis._splits ?? []).map((v, j) => (k ? make("text", { x: -6, y: y(v), "text-anchor": "end" }, axis._values[j]) : make("text", { x: x(v), y: h + 16, "text-anchor": "middle" }, axis._values[j]))));
  const shapes = curves.flatMap((c, i) => [
    c.kind !== "marks" && c.low?.length && make("polygon", { fill: inked[i], "fill-opacity": 0.18, points: [...known(c.x, c.high), ...known(c.x, c.low).reverse()].join(" ") }),
    ...(c.kind === "marks" ? c.x.map((v, j) => make("path", { stroke: inked[i], fill: "none", d: `M${x(v)},${y(c.low[j] ?? c.y[j])}V${y(c.high[j] ?? c.y[j])}M${x(v) - 4},${y(c.y[j])}h8` }))
      : c.kind === "bars" ? c.x.map((v, j) => make("line", { x1: x(v), x2: x(v), y1: h, y2: y(c.y[j]), stroke: inked[i], "stroke-width": (0.6 * w) / c.x.length }))
      : [make("polyline", { fill: "none", stroke: inked[i], "stroke-width": 2, points: known(c.x, c.y).join(" ") })]),
    make("text", { x: 110 * (i % 4), y: h + 36 + 14 * Math.floor(i / 4), fill: inked[i] }, c.name),
  ]);
  const whole = make("svg", { xmlns: "http://www.w3.org/2000/svg", viewBox: `-56 -24 ${w + 70} ${h + 80}`, "font-family": "sans-serif", "font-size": 11 },
    make("text", { x: 0, y: -8 }, title), make("path", { d: `M0,0V${h}H${w}`, fill: "none", stroke: "gray" }), ticks, shapes);
  return new XMLSerializer().serializeToString(whole);
}

function save(name, blob) {
  const at = URL.createObjectURL(blob);
  el("a", { href: at, download: name }).click();
  URL.revokeObjectURL(at);
}

// Lines over named points: curves = [{name, values}].
const lines = (title, labels, curves) => chart({ title, labels, curves: curves.map(({ name, values }) => ({ name, x: values.map((_, i) => i), y: values })) });
