// Curves over named points, and heatmaps, which are tables on demand.

// Lines over common points: curves = [{name, values}].
const lines = (title, labels, curves) =>
  chart({ title, labels, curves: curves.map(({ name, values }) => ({ name, x: values.map((_, i) => i), y: values })) });

function rgb(name) {
  const text = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));
}

// rows x columns of numbers as colours, and the same as a table on demand. Negative ones have the other colour. Rows of `codes` link to them.
function heatmap(title, rowNames, columnNames, values, { show = percent, codes = null } = {}) {
  const cell = [
    Math.max(8, Math.min(28, Math.floor(900 / columnNames.length))),
    Math.max(7, Math.min(18, Math.floor(720 / rowNames.length))),
  ];
  const left = 60,
    top = 18,
    ratio = window.devicePixelRatio || 1;
  const size = [left + cell[0] * columnNames.length + 30, top + cell[1] * rowNames.length];
  const canvas = el("canvas", {
    role: "img",
    "aria-label": `${title}; the same as a table follows`,
    width: size[0] * ratio,
    height: size[1] * ratio,
  });
  canvas.style.width = `${size[0]}px`;
  canvas.style.height = `${size[1]}px`;
  const most = Math.max(1e-12, ...values.map((row) => row.reduce((m, v) => Math.max(m, Math.abs(v)), 0)));
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const back = rgb("--raised"),
    inks = [rgb("--up"), rgb("--down")];
  values.forEach((row, y) =>
    row.forEach((v, x) => {
      const share = Math.sqrt(Math.abs(v) / most),
        ink = inks[v < 0 ? 1 : 0];
      context.fillStyle = `rgb(${back.map((b, i) => Math.round(b + (ink[i] - b) * share)).join(" ")})`;
      context.fillRect(left + x * cell[0], top + y * cell[1], cell[0] - 1, cell[1] - (cell[1] > 8 ? 1 : 0));
    }),
  );
  context.fillStyle = `rgb(${rgb("--soft").join(" ")})`;
  context.font = "10px system-ui";
  const every = (length, place) => Math.max(1, Math.ceil(length / place));
  context.textAlign = "right";
  const downEvery = every(11, cell[1]),
    acrossEvery = every(Math.max(...columnNames.map((n) => n.length)) * 6 + 6, cell[0]);
  rowNames.forEach((name, y) => {
    if (y % downEvery === 0) context.fillText(name, left - 4, top + y * cell[1] + Math.min(cell[1], 12) - 2, left - 6);
  });
  context.textAlign = "left";
  columnNames.forEach((name, x) => {
    if (x % acrossEvery === 0) context.fillText(name, left + x * cell[0], 12);
  });
  const status = el(
    "output",
    {},
    (DARK.matches ? "Brighter" : "Darker") + " is more (square root scale). Point at a cell to read it, click it for its code.",
  );
  const place = (event) => [Math.floor((event.offsetY - top) / cell[1]), Math.floor((event.offsetX - left) / cell[0])];
  canvas.addEventListener("mousemove", (event) => {
    const [y, x] = place(event);
    if (values[y] && values[y][x] !== undefined) status.textContent = `${rowNames[y]}, ${columnNames[x]}: ${show(values[y][x])}`;
  });
  const pick = codes && ((y) => go({ view: "codes", code: codes[y] }));
  if (pick)
    canvas.addEventListener("click", (event) => {
      const [y, x] = place(event);
      if (values[y] && values[y][x] !== undefined) pick(y);
    });
  const folded = el(
    "details",
    {
      ontoggle: () => {
        if (folded.open && folded.childNodes.length === 1) folded.append(asTable());
      },
    },
    el("summary", {}, `${title} as a table`),
  );
  const asTable = () =>
    scrolling(
      title,
      el(
        "table",
        {},
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            el("th", { scope: "col" }, ""),
            columnNames.map((n) => el("th", { scope: "col" }, n)),
          ),
        ),
        el(
          "tbody",
          {},
          values.map((row, y) =>
            el(
              "tr",
              {},
              el("th", { scope: "row" }, codes ? codeLink(codes[y]) : rowNames[y]),
              row.map((v) => el("td", { class: "number" }, show(v))),
            ),
          ),
        ),
      ),
    );
  return el("figure", {}, el("figcaption", {}, title), scrolling(title, canvas), status, folded);
}

const codeNames = (codes) => codes.map((k) => `code ${k}`);
const ranked = (data, value) => data.codes.map((_, k) => k).sort((a, b) => value(data.codes[b], b) - value(data.codes[a], a));
