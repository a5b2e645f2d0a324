// Heatmaps, which are tables on demand.

const rgb = (name) => [1, 3, 5].map((i) => parseInt(css(name).slice(i, i + 2), 16));

// rows x columns of numbers as colours, and the same as a table on demand. Negative ones have the other colour. Rows of `codes` link to them.
function heatmap(title, rowNames, columnNames, values, { show = percent, codes = null } = {}) {
  const cell = [Math.max(8, Math.min(28, Math.floor(900 / columnNames.length))), Math.max(7, Math.min(18, Math.floor(720 / rowNames.length)))];
  const left = 60, top = 18, ratio = window.devicePixelRatio || 1;
  const size = [left + cell[0] * columnNames.length + 30, top + cell[1] * rowNames.length];
  const canvas = el("canvas", { role: "img", "aria-label": `${title}; the same as a table follows`, width: size[0] * ratio, height: size[1] * ratio });
  Object.assign(canvas.style, { width: `${size[0]}px`, height: `${size[1]}px` });
  const most = Math.max(1e-12, ...values.map((row) => row.reduce((m, v) => Math.max(m, Math.abs(v)), 0)));
  const context = canvas.getContext("2d"), back = rgb("--raised"), inks = [rgb("--up"), rgb("--down")];
  context.scale(ratio, ratio);
  values.forEach((row, y) =>
    row.forEach((v, x) => {
      const share = Math.sqrt(Math.abs(v) / most), ink = inks[v < 0 ? 1 : 0];
      context.fillStyle = `rgb(${back.map((b, i) => Math.round(b + (ink[i] - b) * share)).join(" ")})`;
      context.fillRect(left + x * cell[0], top + y * cell[1], cell[0] - 1, cell[1] - (cell[1] > 8 ? 1 : 0));
    }),
  );
  Object.assign(context, { fillStyle: `rgb(${rgb("--soft").join(" ")})`, font: "10px system-ui", textAlign: "right" });
  const every = (length, place) => Math.max(1, Math.ceil(length / place));
  const downEvery = every(11, cell[1]), acrossEvery = every(Math.max(...columnNames.map((n) => n.length)) * 6 + 6, cell[0]);
  rowNames.forEach((name, y) => y % downEvery === 0 && context.fillText(name, left - 4, top + y * cell[1] + Math.min(cell[1], 12) - 2, left - 6));
  context.textAlign = "left";
  columnNames.forEach((name, x) => x % acrossEvery === 0 && context.fillText(name, left + x * cell[0], 12));
  const status = el("output", {}, (DARK.matches ? "Brighter" : "Darker") + " is more (square root scale). Point at a cell to read it, click it for its code.");
  const at = (event, then) => {
    const [y, x] = [Math.floor((event.offsetY - top) / cell[1]), Math.floor((event.offsetX - left) / cell[0])];
    if (values[y] && values[y][x] !== undefined) then(y, x);
  };
  canvas.addEventListener("mousemove", (event) => at(event, (y, x) => (status.textContent = `${rowNames[y]}, ${columnNames[x]}: ${show(values[y][x])}`)));
  if (codes) canvas.addEventListener("click", (event) => at(event, (y) => go({ view: "codes", code: codes[y] })));
  const asTable = () =>
    table(title, [
      { name: "", head: true, cell: (y) => (codes ? codeLink(codes[y]) : rowNames[y]) },
      ...columnNames.map((name, x) => ({ name, number: true, cell: (y) => show(values[y][x]) })),
    ], rowNames.map((_, y) => y));
  return el("figure", {}, el("figcaption", {}, title), scrolling(title, canvas), status, folded(`${title} as a table`, asTable));
}

const ranked = (data, value) => data.codes.map((_, k) => k).sort((a, b) => value(data.codes[b], b) - value(data.codes[a], a));
// Codes by a property whose values `table` has row by row.
const heat = (title, order, keys, rows, options) => heatmap(title, order.map((k) => `code ${k}`), keys, order.map((k) => rows.map((row) => row[k])), { codes: order, ...options });
