"use strict";
// The explorer of a run. Everything shown comes from the JSON beside this script; texts of models enter the page as text nodes only.

const RUNS = JSON.parse(document.getElementById("data").textContent).runs;
const PER_PAGE = 25;
const DARK = matchMedia("(prefers-color-scheme: dark)");
const MINUS = "\u2212";

// ---- state: all of it is in the address, so that any view can be linked to ----------------------------------------------

function state() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const number = (name, end) => {
    const text = asked.get(name);
    return text !== null && /^\d+$/.test(text) && Number(text) < end ? Number(text) : null;
  };
  const run = number("run", RUNS.length) ?? 0;
  const data = RUNS[run];
  const code = number("code", data.codes.length),
    rollout = number("rollout", data.rollouts.length);
  const fallback = rollout !== null ? "rollouts" : code !== null ? "codes" : "gain";
  const view = views().some(([name]) => name === asked.get("view")) ? asked.get("view") : fallback;
  const one = (name, known) => (known.includes(asked.get(name)) ? asked.get(name) : known[0]);
  return {
    run,
    data,
    view,
    code,
    rollout,
    step: number("step", 1e6),
    page: number("page", 1e6) ?? 0,
    split: number("split", data.splits.length) ?? 0,
    sort: one("sort", ["update", "reward", "worst", "advantage", "length"]),
    outcome: one("outcome", ["all", "good", "bad", "explained"]),
  };
}

const REMEMBERED = ["run", "view", "code", "rollout", "step", "page", "split", "sort", "outcome"];

function address(changes) {
  const now = new URLSearchParams(location.hash.slice(1));
  const next = new URLSearchParams();
  for (const name of REMEMBERED) {
    const value = name in changes ? changes[name] : now.get(name);
    if (value !== null && value !== undefined && value !== "") next.set(name, value);
  }
  return "#" + next.toString();
}

const go = (changes) => {
  location.hash = address(changes);
};

// ---- making elements ----------------------------------------------------------------------------------------------------

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
const svg = (tag, attributes, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const link = (changes, attributes, ...children) =>
  el("a", { href: address(changes), "data-key": JSON.stringify(changes), ...attributes }, children);

const percent = (x, digits = 1) => (x === null ? "\u2013" : (100 * x).toFixed(digits) + " %");
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
const words = (data, tokens) => el("span", { class: "text" }, tokens.map((t) => word(data, t)).join(" "));
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
  return scrolling(caption, el("table", {}, el("caption", {}, caption), el("thead", {}, el("tr", {}, heads)), body));
}
const compare = (a, b) => (typeof a === "string" ? -a.localeCompare(b) : (a ?? -Infinity) - (b ?? -Infinity) || 0);

// ---- pictures -----------------------------------------------------------------------------------------------------------

// Lines over common points: curves = [{name, values, ink}].
function lines(title, labels, curves) {
  const all = curves.flatMap((curve) => curve.values);
  const low = Math.min(...all),
    high = Math.max(...all),
    height = high - low || 1;
  const at = (v, i, n) => `${(45 + (400 * i) / Math.max(1, n - 1)).toFixed(1)},${(130 - (120 * (v - low)) / height).toFixed(1)}`;
  return el(
    "figure",
    {},
    el("figcaption", {}, title),
    svg(
      "svg",
      { viewBox: "0 0 460 170", width: 460, height: 170, role: "img", "aria-label": `${title}: ` + curves.map(told).join("; ") },
      svg("rect", { class: "frame", x: 45, y: 10, width: 400, height: 120 }),
      svg("text", { x: 40, y: 18, "text-anchor": "end" }, high.toPrecision(3)),
      svg("text", { x: 40, y: 131, "text-anchor": "end" }, low.toPrecision(3)),
      svg("text", { x: 45, y: 145 }, labels[0]),
      svg("text", { x: 445, y: 145, "text-anchor": "end" }, labels[labels.length - 1]),
      curves.map((c, k) => [
        svg("polyline", {
          "--ink": c.ink,
          stroke: c.ink,
          points: c.values.map((v, i) => at(v, i, c.values.length)).join(" "),
          "stroke-dasharray": k ? "6 3" : null,
        }),
        svg("text", { x: 45 + 200 * k, y: 163 }, (k ? "\u2504 " : "\u2500 ") + c.name),
      ]),
    ),
  );
}
const told = (curve) => `${curve.name} from ${fixed(curve.values[0])} to ${fixed(curve.values[curve.values.length - 1])}`;

function rgb(name) {
  const text = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));
}

// rows x columns of numbers as colours, and the same as a table on demand. Negative ones have the other colour.
function heatmap(title, rowNames, columnNames, values, { show = percent, pick = null } = {}) {
  const cell = [
    Math.max(8, Math.min(28, Math.floor(900 / columnNames.length))),
    Math.max(7, Math.min(18, Math.floor(720 / rowNames.length))),
  ];
  const left = 60,
    top = 18,
    ratio = window.devicePixelRatio || 1;
  const size = [left + cell[0] * columnNames.length, top + cell[1] * rowNames.length];
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
  const status = el("output", {}, "Darker is more (square root scale). Point at a cell to read it.");
  const place = (event) => [Math.floor((event.offsetY - top) / cell[1]), Math.floor((event.offsetX - left) / cell[0])];
  canvas.addEventListener("mousemove", (event) => {
    const [y, x] = place(event);
    if (values[y] && values[y][x] !== undefined) status.textContent = `${rowNames[y]}, ${columnNames[x]}: ${show(values[y][x])}`;
  });
  if (pick)
    canvas.addEventListener("click", (event) => {
      const [y, x] = place(event);
      if (values[y] && values[y][x] !== undefined) pick(y, x);
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
              el("th", { scope: "row" }, rowNames[y]),
              row.map((v) => el("td", { class: "number" }, show(v))),
            ),
          ),
        ),
      ),
    );
  return el("figure", {}, el("figcaption", {}, title), scrolling(title, canvas), status, folded);
}

const transposed = (rows) => (rows.length ? rows[0].map((_, i) => rows.map((row) => row[i])) : []);
const codeNames = (codes) => codes.map((k) => `code ${k}`);
const ranked = (data, value) => data.codes.map((_, k) => k).sort((a, b) => value(data.codes[b], b) - value(data.codes[a], a));

// ---- views --------------------------------------------------------------------------------------------------------------

function views() {
  const found = [
    ["gain", "Gain", gainView],
    ["codes", "Codes", codesView],
    ["rollouts", "Rollouts", rolloutsView],
    ["training", "Training", trainingView],
    ["where", "Where", whereView],
    ["policy", "Before and after", policyView],
  ];
  return RUNS.length > 1 ? [...found, ["compare", "Side by side", compareView]] : found;
}

const title = (text) => el("h2", { tabindex: "-1" }, text);
const notes = (data) => data.summary.notes.map((note) => el("p", { class: "note" }, note));
const writes = (data, code) => (code.contexts.length ? words(data, [...new Set(code.contexts.map((c) => c.token))].slice(0, 3)) : "\u2013");

function gainView({ data }) {
  const s = data.summary;
  const facts = tiles([
    ["reward, first and last tenth of training", `${fixed(s.reward_first)} \u2192 ${fixed(s.reward_last)}`],
    ["success", `${fixed(s.success_first)} \u2192 ${fixed(s.success_last)}`],
    ...s.evaluation.map(([name, value]) => [`held-out success, ${name}`, fixed(value)]),
    ["codes alive", `${data.codes.filter((c) => c.health === "alive").length} of ${s.num_actions}`],
    ["code perplexity", fixed(s.perplexity, 1)],
    ["rollouts read", `${s.rollouts} of ${s.stored}`],
  ]);
  if (!s.gain) return [title("What reinforcement learning gained"), facts, notes(data)];
  const order = ranked(data, (c) => c.gain.mean),
    sum = s.gain.mean,
    most = Math.max(...data.codes.map((c) => Math.abs(c.gain.mean)));
  const sure = order.filter((k) => data.codes[k].gain.low > 0),
    rose = (k) => data.codes[k].after >= data.codes[k].before;
  const position = data.splits[0],
    top = order.slice(0, 16);
  return [
    title("Which codes carry the gain of reinforcement learning"),
    facts,
    notes(data),
    el(
      "p",
      {},
      `The estimated gain of all codes is ${signed(sum)} (${signed(s.gain.low)} to ${signed(s.gain.high)}); the reward of training rollouts rose by ` +
        `${signed(s.reward_last - s.reward_first)}. ${sure.length} codes have a part that is surely above 0` +
        (sure.length ? "; the largest: " : "."),
      sure
        .slice(0, 5)
        .map((k, i) => [i ? ", " : "", codeLink(k), ` ${signed(data.codes[k].gain.mean)} (${rose(k) ? "chosen more" : "chosen less"})`]),
    ),
    el(
      "p",
      { class: "soft" },
      "A code has a positive part when it is chosen more where it pays, or less where it costs. Intervals are at 95 %, one code at a time; " +
        "about one code in twenty lies outside of its own by chance.",
    ),
    table(
      "Codes by their part of the gain",
      [
        { name: "code", cell: (k) => codeLink(k), value: (k) => k },
        { name: "gain", number: true, cell: (k) => signed(data.codes[k].gain.mean, 4), value: (k) => data.codes[k].gain.mean },
        { name: "", cell: (k) => middleBar(data.codes[k].gain.mean, most) },
        { name: "95 % interval", cell: (k) => `${signed(data.codes[k].gain.low, 4)} to ${signed(data.codes[k].gain.high, 4)}` },
        {
          name: "of all",
          number: true,
          cell: (k) => (sum ? percent(data.codes[k].gain.mean / sum, 0) : "\u2013"),
          value: (k) => data.codes[k].gain.mean,
        },
        { name: "chosen before", number: true, cell: (k) => percent(data.codes[k].before), value: (k) => data.codes[k].before },
        { name: "after", number: true, cell: (k) => percent(data.codes[k].after), value: (k) => data.codes[k].after },
        { name: "change", number: true, cell: (k) => change(data.codes[k]), value: (k) => data.codes[k].after - data.codes[k].before },
        { name: "mean advantage", number: true, cell: (k) => fixed(data.codes[k].advantage), value: (k) => data.codes[k].advantage },
        { name: "writes", cell: (k) => writes(data, data.codes[k]) },
      ],
      order,
      { sort: 1 },
    ),
    el("h3", {}, "Where in a response"),
    heatmap(
      "gain by position, the 16 codes with the most",
      codeNames(top),
      position.keys,
      top.map((k) => position.gain.map((row) => row[k])),
      { show: (v) => signed(v, 4), pick: (y) => go({ view: "codes", code: top[y] }) },
    ),
  ];
}
const change = (code) => el("span", { class: code.after >= code.before ? "up" : "down" }, signed(100 * (code.after - code.before), 1));

function codesView({ data, code }) {
  const most = Math.max(...data.codes.map((c) => c.usage));
  const all = table(
    "All codes",
    [
      { name: "code", cell: (k) => codeLink(k), value: (k) => k },
      { name: "usage", number: true, cell: (k) => percent(data.codes[k].usage, 2), value: (k) => data.codes[k].usage },
      { name: "", cell: (k) => bar(data.codes[k].usage, most, hue(k)) },
      { name: "chosen", number: true, cell: (k) => data.codes[k].uses, value: (k) => data.codes[k].uses },
      { name: "health", cell: (k) => data.codes[k].health, value: (k) => data.codes[k].health },
      {
        name: "entropy of its tokens",
        number: true,
        cell: (k) => fixed(data.codes[k].token_entropy, 2),
        value: (k) => data.codes[k].token_entropy,
      },
      { name: "strength", number: true, cell: (k) => fixed(data.codes[k].strength, 2), value: (k) => data.codes[k].strength },
      { name: "mean advantage", number: true, cell: (k) => fixed(data.codes[k].advantage), value: (k) => data.codes[k].advantage },
      { name: "writes", cell: (k) => writes(data, data.codes[k]) },
    ],
    data.codes.map((_, k) => k),
    { sort: 1, chosen: (k) => k === code },
  );
  return [
    title(code === null ? "Codes" : `Code ${code}`),
    code === null ? null : codeDetail(data, code),
    el("h3", {}, "All codes"),
    el(
      "p",
      { class: "soft" },
      "Usage is the share of all choices. Strength: how far the code moves the next token away from the mixture of codes that the policy " +
        "had before reinforcement learning (KL, nats). Alive: used more than a tenth of an even share.",
    ),
    all,
  ];
}

function codeDetail(data, k) {
  const c = data.codes[k],
    position = data.splits[0];
  const number = (name, digits, value, why) => ({ name, number: true, cell: (row) => fixed(value(row), digits), value, why });
  const grams = (name, rows) =>
    table(
      name,
      [
        { name: "codes", cell: (g) => codesInLine(g.codes) },
        { name: "wrote", cell: (g) => words(data, g.tokens) },
        { name: "in better rollouts", number: true, cell: (g) => g.high },
        { name: "in worse", number: true, cell: (g) => g.low },
        number("z", 1, (g) => g.z),
      ],
      rows,
    );
  return el(
    "section",
    { class: "panel", "aria-label": `code ${k}` },
    tiles([
      ["usage", percent(c.usage, 2)],
      ["health", c.health],
      ["entropy of its tokens", `${fixed(c.token_entropy, 2)} nats`],
      ["mean advantage", fixed(c.advantage)],
      ["strength", c.strength === null ? "\u2013" : `${fixed(c.strength, 2)} nats`],
      ...(c.gain
        ? [
            ["chosen before \u2192 after RL", `${percent(c.before)} \u2192 ${percent(c.after)}`],
            ["part of the gain", `${signed(c.gain.mean, 4)} (${signed(c.gain.low, 4)} to ${signed(c.gain.high, 4)})`],
          ]
        : []),
    ]),
    el("p", {}, link({ view: "rollouts", code: k, rollout: null, page: null }, {}, "Rollouts with this code")),
    el(
      "div",
      { class: "columns" },
      el(
        "div",
        {},
        el("h3", {}, "What it does to the next token"),
        c.shifts.length
          ? table(
              "Where it was chosen: what it raises and lowers most",
              [
                { name: "token", cell: (s) => words(data, [s.token]) },
                { name: "with the code", number: true, cell: (s) => percent(s.probability), value: (s) => s.probability },
                { name: "mixture before RL", number: true, cell: (s) => percent(s.mixture), value: (s) => s.mixture },
                { name: "log shift", number: true, cell: (s) => signed(s.log_shift, 2), value: (s) => s.log_shift },
                { name: "", cell: (s) => middleBar(s.probability - s.mixture, 1) },
              ],
              c.shifts,
            )
          : el("p", {}, "Not measured."),
        c.anywhere.length
          ? el(
              "p",
              {},
              "Its likeliest tokens at states of all codes: ",
              c.anywhere.map(([t, p], i) => [i ? ", " : "", words(data, [t]), ` ${percent(p)}`]),
            )
          : null,
      ),
      el(
        "div",
        {},
        el("h3", {}, "Where it fires most"),
        table(
          "Most frequent contexts",
          [
            { name: "after", cell: (x) => words(data, x.before) },
            { name: "it wrote", cell: (x) => words(data, [x.token]) },
            { name: "times", number: true, cell: (x) => x.count },
            { name: "of these by this code", number: true, cell: (x) => percent(x.share, 0) },
            {
              name: "example",
              cell: (x) =>
                x.rollout === null ? "" : link({ view: "rollouts", rollout: x.rollout, code: k, step: null }, {}, `rollout ${x.rollout}`),
            },
          ],
          c.contexts,
        ),
      ),
    ),
    el(
      "div",
      { class: "columns" },
      el("div", {}, el("h3", {}, "Its n-grams in better rollouts"), grams("More reward than the mean of the group", c.better)),
      el("div", {}, el("h3", {}, "Its n-grams in worse rollouts"), grams("Less reward than the mean of the group", c.worse)),
    ),
    el(
      "div",
      { class: "columns" },
      lines("usage over training", data.training.updates, [
        { name: `code ${k}`, values: data.training.usage.map((row) => row[k]), ink: "var(--accent)" },
      ]),
      lines("usage by position", position.keys, [{ name: `code ${k}`, values: position.usage.map((row) => row[k]), ink: "var(--accent)" }]),
    ),
  );
}

// -- rollouts --

const SORTS = {
  update: (a, b) => b.update - a.update,
  reward: (a, b) => b.reward - a.reward,
  worst: (a, b) => a.reward - b.reward,
  advantage: (a, b) => b.advantage - a.advantage,
  length: (a, b) => b.tokens.length - a.tokens.length,
};

function rolloutsView(now) {
  const { data, code, rollout, sort, outcome, page } = now;
  const explained = new Set(data.why.map((w) => w.rollout));
  const wanted = { all: () => true, good: (r) => r.success, bad: (r) => !r.success, explained: (_, i) => explained.has(i) }[outcome];
  const found = data.rollouts.map((r, i) => [r, i]).filter(([r, i]) => wanted(r, i) && (code === null || r.codes.includes(code)));
  found.sort(([a, i], [b, j]) => SORTS[sort](a, b) || i - j);
  const pages = Math.max(1, Math.ceil(found.length / PER_PAGE)),
    here = Math.min(page, pages - 1);
  const choose = (name, options, value) =>
    el(
      "label",
      {},
      name,
      el(
        "select",
        {
          "data-key": `select ${name}`,
          onchange: (event) =>
            go({ [{ "with code": "code", "sorted by": "sort", show: "outcome" }[name]]: event.target.value, page: null }),
        },
        options.map(([v, text]) => el("option", { value: v, selected: String(v) === String(value ?? "") }, text)),
      ),
    );
  const pager = (where) =>
    el(
      "div",
      { class: "pager" },
      here > 0 && link({ page: here - 1 }, { "data-key": `back ${where}` }, "Back"),
      `${found.length} rollouts, page ${here + 1} of ${pages}`,
      here + 1 < pages && link({ page: here + 1 }, { "data-key": `next ${where}` }, "Next"),
    );
  return [
    title(rollout === null ? "Rollouts" : `Rollout ${rollout}`),
    rollout === null ? null : rolloutDetail(now),
    el(
      "div",
      { class: "controls" },
      choose("with code", [["", "any"], ...data.codes.map((c, k) => [k, `${k} (${percent(c.usage)})`])], code),
      choose(
        "sorted by",
        [
          ["update", "latest first"],
          ["reward", "reward, best first"],
          ["worst", "reward, worst first"],
          ["advantage", "advantage"],
          ["length", "length"],
        ],
        sort,
      ),
      choose(
        "show",
        [
          ["all", "all"],
          ["good", "successes"],
          ["bad", "failures"],
          ["explained", "explained ones"],
        ],
        outcome,
      ),
    ),
    el("p", { class: "soft" }, "Each token stands over the code that produced it; click one to see only rollouts with its code."),
    pager("above"),
    el(
      "ol",
      { class: "rollouts" },
      found.slice(here * PER_PAGE, (here + 1) * PER_PAGE).map(([r, i]) =>
        el(
          "li",
          { class: i === rollout && "chosen" },
          link({ rollout: i, step: null }, {}, `rollout ${i}`),
          " ",
          el("span", { class: r.success ? "good" : "bad" }, `reward ${fixed(r.reward, 2)}`),
          el(
            "span",
            { class: "soft" },
            `, ${signed(r.advantage, 2)} against its group, update ${r.update}${explained.has(i) ? ", explained" : ""} `,
          ),
          el("span", { class: "text" }, printable(data.prompts[r.prompt].slice(-160))),
          " ",
          r.tokens.map((t, j) =>
            el(
              "span",
              { class: "token", "--hue": hue(r.codes[j]), onclick: () => go({ code: r.codes[j], page: null }) },
              word(data, t),
              el("small", {}, r.codes[j]),
            ),
          ),
        ),
      ),
    ),
    pager("below"),
  ];
}

function rolloutDetail({ data, rollout, step }) {
  const r = data.rollouts[rollout],
    why = data.why.find((w) => w.rollout === rollout);
  const steps = new Map(why ? why.steps.map((s) => [s.position, s]) : []);
  const open = why && (steps.has(step) ? step : (why.steps.find((s) => s.endings.length) || why.steps[0]).position);
  const tokens = why
    ? r.tokens.map((t, j) =>
        el(
          "button",
          {
            type: "button",
            class: "token",
            "--hue": hue(r.codes[j]),
            "aria-pressed": String(j === open),
            "data-key": `step ${j}`,
            disabled: !steps.has(j),
            "aria-label": `token ${j}, ${word(data, t)}, code ${r.codes[j]}`,
            onclick: () => go({ step: j }),
          },
          word(data, t),
          el("small", {}, r.codes[j]),
        ),
      )
    : r.tokens.map((t, j) => el("span", { class: "token", "--hue": hue(r.codes[j]) }, word(data, t), el("small", {}, r.codes[j])));
  const chance = (values, j) => (values.length && values[j] >= 0 ? `${values[j]} %` : "");
  return el(
    "section",
    { class: "panel", "aria-label": `rollout ${rollout}` },
    tiles([
      ["reward", fixed(r.reward, 3)],
      ["against its group", signed(r.advantage)],
      ["success", r.success ? "yes" : "no"],
      ["update", r.update],
    ]),
    el("p", { class: "soft" }, r.id),
    el("p", { class: "text" }, printable(data.prompts[r.prompt])),
    el("p", {}, tokens),
    why
      ? el("div", {}, el("h3", {}, `Why ${word(data, r.tokens[open])} at token ${open}`), stepDetail(data, r, steps.get(open)))
      : el("p", { class: "soft" }, "Not among the explained rollouts (show: explained ones)."),
    el(
      "details",
      {},
      el("summary", {}, "Every token: the chances of its code"),
      table(
        "Chances of the code that was chosen",
        [
          { name: "token", cell: (j) => words(data, [r.tokens[j]]) },
          { name: "code", cell: (j) => codeLink(r.codes[j]) },
          { name: "when sampled", number: true, cell: (j) => chance(r.chances, j), value: (j) => r.chances[j] },
          { name: "before RL", number: true, cell: (j) => chance(r.before, j), value: (j) => r.before[j] ?? -1 },
          { name: "after RL", number: true, cell: (j) => chance(r.after, j), value: (j) => r.after[j] ?? -1 },
        ],
        r.tokens.map((_, j) => j),
      ),
    ),
  );
}

function stepDetail(data, r, step) {
  const token = r.tokens[step.position],
    chosen = r.codes[step.position];
  const at = (t) => (t === token ? el("strong", {}, words(data, [t]), " (chosen)") : words(data, [t]));
  return el(
    "div",
    {},
    el(
      "div",
      { class: "columns" },
      table(
        "Chances of the tokens, over all codes that produce them",
        [
          { name: "token", cell: (m) => at(m[0]) },
          { name: "before RL", number: true, cell: (m) => percent(m[1]), value: (m) => m[1] },
          { name: "after RL", number: true, cell: (m) => percent(m[2]), value: (m) => m[2] },
          { name: "", cell: (m) => bar(m[2], 1) },
          { name: "codes", number: true, cell: (m) => m[3] },
        ],
        step.masses,
      ),
      table(
        "The policy's chances of the codes, and the token each would have produced",
        [
          { name: "code", cell: (o) => [codeLink(o.code), o.code === chosen ? " (chosen)" : ""] },
          { name: "before RL", number: true, cell: (o) => percent(o.before), value: (o) => o.before },
          { name: "after RL", number: true, cell: (o) => percent(o.after), value: (o) => o.after },
          { name: "", cell: (o) => bar(o.after, 1, hue(o.code)) },
          { name: "token", cell: (o) => at(o.token) },
          { name: "sure", number: true, cell: (o) => percent(o.certainty, 0), value: (o) => o.certainty },
        ],
        step.options,
      ),
    ),
    step.endings.length
      ? table(
          "How it ends with each choice, the policy after RL choosing greedily from there",
          [
            { name: "code", cell: (e, i) => [codeLink(e.code), e === step.endings[0] ? " (chosen)" : ""] },
            {
              name: "reward",
              number: true,
              cell: (e) => el("span", { class: e.success ? "good" : "bad" }, e.reward === null ? "not judged" : fixed(e.reward, 2)),
              value: (e) => e.reward,
            },
            {
              name: "against the chosen one",
              number: true,
              cell: (e) =>
                e === step.endings[0] || e.reward === null || step.endings[0].reward === null
                  ? ""
                  : signed(e.reward - step.endings[0].reward, 2),
            },
            { name: "from here on", wide: true, cell: (e) => words(data, e.tokens) },
          ],
          step.endings,
        )
      : el("p", { class: "soft" }, "No other token was likely enough here to be played to its end."),
  );
}

// -- training, where, before and after --

function trainingView({ data }) {
  const t = data.training,
    order = ranked(data, (c) => c.usage),
    final = t.perplexity[t.perplexity.length - 1];
  return [
    title("Codes over training"),
    el(
      "p",
      {},
      `Code perplexity, the effective number of codes in use, went from ${fixed(t.perplexity[0], 1)} to ${fixed(final, 1)} of ${data.summary.num_actions}. ` +
        (final < t.perplexity[0] / 4 ? "That is a collapse: less than a quarter is left." : "A collapse would show as a fall towards 1."),
    ),
    el(
      "div",
      { class: "columns" },
      lines("code perplexity by update", t.updates, [{ name: "perplexity", values: t.perplexity, ink: "var(--accent)" }]),
      lines("reward and success by update", t.updates, [
        { name: "reward", values: t.reward, ink: "var(--accent)" },
        { name: "success", values: t.success, ink: "var(--down)" },
      ]),
    ),
    heatmap(
      "usage of each code by update",
      codeNames(order),
      t.updates,
      order.map((k) => t.usage.map((row) => row[k])),
      { pick: (y) => go({ view: "codes", code: order[y] }) },
    ),
  ];
}

const splitChoice = (data, split) =>
  el(
    "div",
    { class: "controls" },
    el(
      "label",
      {},
      "by",
      el(
        "select",
        { "data-key": "split", onchange: (event) => go({ split: event.target.value }) },
        data.splits.map((s, i) => el("option", { value: i, selected: i === split }, s.name)),
      ),
    ),
  );

function whereView({ data, split }) {
  const s = data.splits[split],
    order = ranked(data, (c) => c.usage);
  return [
    title("Where codes are chosen"),
    splitChoice(data, split),
    el(
      "p",
      { class: "soft" },
      `Share of the choices in each column (${s.name}: ${s.keys.map((key, i) => `${key} has ${s.counts[i]}`).join(", ")}).`,
    ),
    heatmap(
      `usage by ${s.name}`,
      codeNames(order),
      s.keys,
      order.map((k) => s.usage.map((row) => row[k])),
      { pick: (y) => go({ view: "codes", code: order[y] }) },
    ),
  ];
}

function policyView({ data, split }) {
  const s = data.splits[split];
  if (!s.before.length) return [title("The policy before and after RL"), notes(data), el("p", {}, "Not computed.")];
  const order = ranked(data, (c) => c.after - c.before),
    most = Math.max(...data.codes.map((c) => Math.abs(c.after - c.before)));
  const place = (k, sign) => {
    let best = 0;
    s.after.forEach((row, i) => {
      if (sign * (row[k] - s.before[i][k]) > sign * (s.after[best][k] - s.before[best][k])) best = i;
    });
    return best;
  };
  const where = (k) => {
    const i = place(k, data.codes[k].after >= data.codes[k].before ? 1 : -1);
    return `${s.keys[i]} (${signed(100 * (s.after[i][k] - s.before[i][k]), 1)} points)`;
  };
  return [
    title("The policy before and after reinforcement learning"),
    el("p", { class: "soft" }, "Mean probability of each code over the same choices, those of the rollouts on this page."),
    splitChoice(data, split),
    table(
      "Codes that rose and fell",
      [
        { name: "code", cell: (k) => codeLink(k), value: (k) => k },
        { name: "before", number: true, cell: (k) => percent(data.codes[k].before), value: (k) => data.codes[k].before },
        { name: "after", number: true, cell: (k) => percent(data.codes[k].after), value: (k) => data.codes[k].after },
        {
          name: "change, points",
          number: true,
          cell: (k) => change(data.codes[k]),
          value: (k) => data.codes[k].after - data.codes[k].before,
        },
        { name: "", cell: (k) => middleBar(data.codes[k].after - data.codes[k].before, most) },
        { name: `most at ${s.name}`, cell: where },
        { name: "part of the gain", number: true, cell: (k) => signed(data.codes[k].gain.mean, 4), value: (k) => data.codes[k].gain.mean },
        { name: "writes", cell: (k) => writes(data, data.codes[k]) },
      ],
      order,
      { sort: 3 },
    ),
    heatmap(
      `change of probability by ${s.name}`,
      codeNames(order),
      s.keys,
      order.map((k) => s.after.map((row, i) => row[k] - s.before[i][k])),
      { show: (v) => signed(100 * v, 1) + " points", pick: (y) => go({ view: "codes", code: order[y] }) },
    ),
  ];
}

// -- two runs --

function compareView() {
  const [a, b] = RUNS,
    same = a.summary.world === b.summary.world;
  const other = (k) => (same ? [k, 1] : a.similar[k]);
  const side = (name, run) =>
    el(
      "div",
      {},
      el("h3", {}, `${name}: ${run.summary.run}`),
      tiles([
        ["reward, first and last", `${fixed(run.summary.reward_first)} \u2192 ${fixed(run.summary.reward_last)}`],
        ["code perplexity", fixed(run.summary.perplexity, 1)],
        ["codes alive", run.codes.filter((c) => c.health === "alive").length],
        ["estimated gain", run.summary.gain ? signed(run.summary.gain.mean) : "\u2013"],
        ...run.summary.evaluation.map(([variant, value]) => [`held-out success, ${variant}`, fixed(value)]),
      ]),
    );
  const both = (what, value) =>
    lines(
      what,
      [`first`, `last update`],
      [
        { name: `A ${a.summary.run}`, values: value(a), ink: "var(--accent)" },
        { name: `B ${b.summary.run}`, values: value(b), ink: "var(--down)" },
      ],
    );
  const gain = (code) => (code.gain ? signed(code.gain.mean, 4) : "\u2013");
  return [
    title(`${a.summary.run} beside ${b.summary.run}`),
    el("div", { class: "columns" }, side("A", a), side("B", b)),
    el(
      "div",
      { class: "columns" },
      both("reward over training", (r) => r.training.reward),
      both("code perplexity over training", (r) => r.training.perplexity),
    ),
    el(
      "p",
      {},
      same
        ? "Both runs have one codebook: a code means the same in both."
        : "The runs have codebooks of their own: each code of A stands beside the code of B that writes most alike (overlap of the tokens they produced in rollouts).",
    ),
    table(
      "Codes of A and their likes in B",
      [
        { name: "A", cell: (k) => codeLink(k, { run: 0 }), value: (k) => k },
        { name: "writes", cell: (k) => writes(a, a.codes[k]) },
        { name: "usage", number: true, cell: (k) => percent(a.codes[k].usage), value: (k) => a.codes[k].usage },
        { name: "gain", number: true, cell: (k) => gain(a.codes[k]), value: (k) => (a.codes[k].gain || {}).mean },
        { name: "B", cell: (k) => codeLink(other(k)[0], { run: 1 }), value: (k) => other(k)[0] },
        { name: "overlap", number: true, cell: (k) => percent(other(k)[1], 0), value: (k) => other(k)[1] },
        { name: "writes", cell: (k) => writes(b, b.codes[other(k)[0]]) },
        { name: "usage", number: true, cell: (k) => percent(b.codes[other(k)[0]].usage), value: (k) => b.codes[other(k)[0]].usage },
        { name: "gain", number: true, cell: (k) => gain(b.codes[other(k)[0]]), value: (k) => (b.codes[other(k)[0]].gain || {}).mean },
      ],
      a.codes.map((_, k) => k),
      { sort: 2 },
    ),
    sharedPrompts(a, b),
  ];
}

function sharedPrompts(a, b) {
  const byPrompt = (run) => {
    const found = new Map();
    run.rollouts.forEach((r, i) => {
      const text = run.prompts[r.prompt];
      found.set(text, [...(found.get(text) || []), i]);
    });
    return found;
  };
  const [ours, theirs] = [byPrompt(a), byPrompt(b)],
    shared = [...ours.keys()].filter((text) => theirs.has(text)).slice(0, 200);
  const mean = (run, rows) => rows.reduce((sum, i) => sum + run.rollouts[i].reward, 0) / rows.length;
  const last = (run, rows, k) =>
    link(
      { run: k, view: "rollouts", rollout: rows[rows.length - 1], code: null, step: null },
      {},
      words(run, run.rollouts[rows[rows.length - 1]].tokens),
    );
  if (!shared.length) return el("p", {}, "No prompt is on both pages.");
  return table(
    `Prompts on both pages (${shared.length})`,
    [
      { name: "prompt", wide: true, cell: (t) => el("span", { class: "text" }, printable(t.slice(-160))) },
      { name: "reward A", number: true, cell: (t) => fixed(mean(a, ours.get(t)), 2), value: (t) => mean(a, ours.get(t)) },
      { name: "reward B", number: true, cell: (t) => fixed(mean(b, theirs.get(t)), 2), value: (t) => mean(b, theirs.get(t)) },
      { name: "last of A", wide: true, cell: (t) => last(a, ours.get(t), 0) },
      { name: "last of B", wide: true, cell: (t) => last(b, theirs.get(t), 1) },
    ],
    shared,
    { sort: 1 },
  );
}

// ---- putting it on the page ---------------------------------------------------------------------------------------------

let shownBefore = null;

function render() {
  const now = state(),
    main = document.getElementById("main");
  const key = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.key : null;
  document.getElementById("title").textContent = `Explorer: ${now.data.summary.run}`;
  document.title = `${now.data.summary.run}: explorer`;
  const runs = document.getElementById("runs");
  runs.hidden = RUNS.length < 2;
  const away = { code: null, rollout: null, step: null, page: null, split: null };
  runs.replaceChildren(
    ...RUNS.map((run, i) => link({ run: i, ...away }, { "aria-current": i === now.run && "true" }, `${"AB"[i]}: ${run.summary.run}`)),
  );
  document
    .getElementById("views")
    .replaceChildren(
      ...views().map(([name, text]) =>
        link({ view: name, rollout: null, step: null, page: null }, { "aria-current": name === now.view && "page" }, text),
      ),
    );
  const [, , show] = views().find(([name]) => name === now.view);
  main.replaceChildren(...[show(now)].flat(Infinity).filter(Boolean));
  const subject = [now.run, now.view, now.code, now.rollout].join();
  const again = key && [...document.querySelectorAll("[data-key]")].find((node) => node.dataset.key === key);
  if (again && !(shownBefore !== subject && main.contains(again) && again.tagName === "A")) again.focus({ preventScroll: true });
  else if (shownBefore !== null && shownBefore !== subject) {
    main.querySelector("h2").focus({ preventScroll: true });
    window.scrollTo(0, 0);
  }
  shownBefore = subject;
}

document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  document.getElementById("main").focus();
});
window.addEventListener("hashchange", render);
DARK.addEventListener("change", render);
render();
