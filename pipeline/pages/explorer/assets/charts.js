// Curves with bands and stacked bars, by uPlot: a readout follows the pointer or the arrow keys; dragging zooms (keys + and -), a double
// click or 0 shows all again; PNG and CSV.

const short = (x) => (Number.isFinite(x) ? String(Number(x.toPrecision(4))).replace("-", MINUS) : "\u2013");
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const HIGH = 200;

// `figure`: title, across, note, curves of name, x, y and, where there are any, low, high, raw and joined, as pipeline/pages/charts/records.py
// has them; `labels`: names of the places x; `stacked`: bars on each other; `said(i)`: the readout at place i of all x.
function chart({ title, across = "", note = "", labels = null, curves, stacked = false, said = null }) {
  const xs = [...new Set(curves.flatMap((c) => c.x))].sort((a, b) => a - b);
  const place = (x) => labels?.[x] ?? short(x);
  const inked = curves.map((c, i) => c.ink ?? css(`--i${i % 7}`));
  const { data, series, bands } = columns(xs, curves, inked, stacked);
  const read = said ?? ((i) => `${across} ${place(xs[i])}: ` + curves.map((c) => value(c, xs[i])).filter(Boolean).join(", "));
  const out = el("output", {}, read(xs.length - 1));
  const box = el("div", { class: "reader", tabindex: "0", role: "group", "aria-label": `${title}: arrow keys read the values`, onkeydown: pressed });
  const axis = { stroke: css("--soft"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line") }, font: "11px system-ui" };
  const plot = new uPlot(
    {
      width: Math.min(460, innerWidth - 48), height: HIGH, series, bands, legend: { show: false },
      scales: { x: { time: false }, y: { range: (_, low, high) => uPlot.rangeNum(stacked ? 0 : low, high, 0.1, true) } },
      axes: [
        { ...axis, label: across, labelSize: 16, labelFont: axis.font, size: 26, values: (_, at) => at.map((x) => (labels ? (labels[x] ?? "") : short(x))), ...(labels && { incrs: [1, 2, 5, 10, 20, 50, 100] }) },
        { ...axis, size: 50, values: (_, at) => at.map(short) },
      ],
      cursor: { y: false, points: { show: false } },
      hooks: { setCursor: [(u) => u.cursor.idx !== null && u.cursor.idx !== undefined && tell(u.cursor.idx)], draw: [(u) => whiskers(u, curves, inked)] },
    },
    data,
    box,
  );
  new ResizeObserver(([entry]) => entry.contentRect.width > 60 && plot.setSize({ width: entry.contentRect.width, height: HIGH })).observe(box);
  let here = xs.length - 1;
  const tell = (i) => (out.textContent = read((here = i)));
  function zoomed(by) {
    const { min, max } = plot.scales.x, half = ((max - min) * by) / 2;
    plot.setScale("x", { min: Math.max(xs[0], xs[here] - half), max: Math.min(xs.at(-1), xs[here] + half) });
  }
  function pressed(event) {
    const moves = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: xs.length - 1 };
    const zooms = { "+": () => zoomed(0.5), "-": () => zoomed(2), 0: () => plot.setScale("x", { min: xs[0], max: xs.at(-1) }) };
    if (event.ctrlKey || event.altKey || event.metaKey || !(event.key in moves || event.key in zooms)) return;
    event.preventDefault();
    if (event.key in zooms) return zooms[event.key]();
    tell(Math.max(0, Math.min(xs.length - 1, moves[event.key])));
    plot.setCursor({ left: plot.valToPos(xs[here], "x"), top: 0 });
  }
  const rows = () => [[across || "x", ...curves.map((c) => c.name)], ...xs.map((x) => [place(x), ...curves.map((c) => c.y[c.x.indexOf(x)] ?? "")])];
  const csv = () => new Blob([rows().map((row) => row.map((cell) => JSON.stringify(cell)).join(",")).join("\n")], { type: "text/csv" });
  return el(
    "figure",
    {},
    el("figcaption", {}, el("strong", {}, title)),
    box,
    curves.length > 1 && el("p", { class: "legend" }, curves.map((c, i) => el("span", {}, el("i", { "--ink": inked[i], "aria-hidden": "true" }), c.name))),
    out,
    el("details", {}, el("summary", {}, "about, PNG, CSV"), note && el("p", { class: "soft" }, `${note}.`), el("p", { class: "actions" },
      el("button", { type: "button", onclick: () => plot.ctx.canvas.toBlob((blob) => save(`${title}.png`, blob)) }, "PNG"), " ",
      el("button", { type: "button", onclick: () => save(`${title}.csv`, csv()) }, "CSV"))),
  );
}

function value(curve, x) {
  const j = curve.x.indexOf(x);
  if (j < 0 || curve.y[j] === null) return "";
  return `${curve.name} ${short(curve.y[j])}` + (Number.isFinite(curve.low?.[j] ?? NaN) ? ` (${short(curve.low[j])} to ${short(curve.high[j])})` : "");
}

function columns(xs, curves, inked, stacked) {
  const data = [xs], series = [{}], bands = [];
  const add = (x, y, options) => {
    const at = new Map(x.map((one, j) => [one, y[j]]));
    data.push(xs.map((one) => at.get(one) ?? null));
    return series.push({ spanGaps: true, points: { show: false }, ...options }) - 1;
  };
  if (stacked) {
    const sums = curves.map((_, k) => xs.map((_x, i) => curves.slice(0, k + 1).reduce((sum, c) => sum + c.y[i], 0)));
    for (let k = curves.length - 1; k >= 0; k--) add(xs, sums[k], { fill: inked[k], width: 0, paths: uPlot.paths.bars({ size: [0.85] }) });
    return { data, series, bands };
  }
  const dots = (fill, size) => ({ paths: () => null, points: { show: true, size, width: 0, fill } });
  curves.forEach((c, i) => {
    if (c.raw?.length) add(c.raw.map(([x]) => x), c.raw.map(([, y]) => y), dots(inked[i] + "66", 3));
    if (c.low?.length && c.joined !== false) bands.push({ series: [add(c.x, c.high, { width: 0 }), add(c.x, c.low, { width: 0 })], fill: inked[i] + "2e" });
    add(c.x, c.y, c.joined === false ? dots(inked[i], 7) : { stroke: inked[i], width: 2, dash: i ? [7, 3 * (i % 3)] : [] });
  });
  return { data, series, bands };
}

// Of marks that no line joins.
function whiskers(u, curves, inked) {
  curves.forEach((c, i) => {
    if (c.joined !== false || !c.low?.length) return;
    u.ctx.fillStyle = inked[i];
    c.x.forEach((x, j) => {
      const [at, low, high] = [u.valToPos(x, "x", true), u.valToPos(c.low[j], "y", true), u.valToPos(c.high[j], "y", true)];
      u.ctx.fillRect(at - 1, high, 2, low - high);
    });
  });
}

function save(name, blob) {
  const at = URL.createObjectURL(blob);
  el("a", { href: at, download: name }).click();
  URL.revokeObjectURL(at);
}
