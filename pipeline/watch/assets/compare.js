// Several runs of the folder side by side, as pipeline/experiments/compare_many.py has them.

// An interval on a scale that all rows share.
function whisker({ value, low, high }, [from, to]) {
  const at = (x) => `${(100 * (x - from)) / (to - from || 1)}%`;
  const zero = from < 0 && to > 0 && el("s", { "--from": at(0) });
  return el("span", { class: "whisker", "aria-hidden": "true" }, zero, el("i", { "--from": at(low), "--to": at(high) }), el("b", { "--from": at(value) }));
}
const span = (rows, zero) => [Math.min(...rows.map((r) => r.low), ...zero), Math.max(...rows.map((r) => r.high), ...zero)];

function forest(caption, rows, shown, zero = []) {
  const scale = span(rows, zero);
  return table(caption, [
    { name: "", cell: (r) => r.name },
    { name: "mode", cell: (r) => r.mode },
    { name: "mean", number: true, cell: (r) => shown(r.value), value: (r) => r.value },
    { name: "95 % interval", cell: (r) => `${shown(r.low)} to ${shown(r.high)}` },
    { name: "", cell: (r) => whisker(r, scale) },
    { name: "over", cell: (r) => r.unit },
  ], rows);
}

// What both answers share at their ends is soft.
function apart(own, other) {
  let from = 0, end = 0;
  while (from < Math.min(own.length, other.length) && own[from] === other[from]) from++;
  while (end < Math.min(own.length, other.length) - from && own.at(-1 - end) === other.at(-1 - end)) end++;
  const cut = own.length - end;
  const part = (text, kind) => text && el("span", { class: kind }, printable(text));
  return el("span", { class: "text" }, part(own.slice(0, from), "soft"), part(own.slice(from, cut), "apart"), part(own.slice(cut), "soft"));
}

const money = (x) => (x === null ? "\u2013" : x >= 1000 ? Math.round(x).toLocaleString("en") : x.toPrecision(3));

function comparison({ methods, differences, level, curves, flipped, config }) {
  const best = differences.filter((d) => d.mode === "sampled");
  return [
    best.map((d) => el("p", {}, el("strong", {}, d.low > 0 || d.high < 0 ? `${d.name[d.low > 0 ? 0 : 4]} is better: ` : "No significant difference: "), `${d.name} is ${signed(d.value)} (95 % interval ${signed(d.low)} to ${signed(d.high)}), sampled success, over ${d.unit}${d.unit.includes("prompts") ? "; other seeds may differ" : ""}.`)),
    forest("Success on held-out prompts", methods.flatMap((m) => m.success.map((s) => ({ name: m.name, ...s }))), (x) => fixed(x)),
    differences.length > 0 && forest("Differences on the same held-out prompts", differences, (x) => signed(x), [0]),
    table("Methods: runs that differ in their seed only are one", [
      { name: "", cell: (m) => m.name },
      { name: "runs", wide: true, cell: (m) => m.runs.map((r) => `${printable(r.name)} (seed ${r.seed})`).join(", ") },
      { name: "seconds", number: true, cell: (m) => money(m.costs.seconds), value: (m) => m.costs.seconds },
      { name: "rollouts", number: true, cell: (m) => money(m.costs.rollouts), value: (m) => m.costs.rollouts },
      { name: `rollouts to reward ${fixed(level, 2)}`, number: true, cell: (m) => money(m.reached.rollouts), value: (m) => m.reached.rollouts },
      { name: "seconds of RL to it", number: true, cell: (m) => money(m.reached.seconds), value: (m) => m.reached.seconds },
    ], methods),
    el("p", { class: "soft" }, "Cost to reach: until the last 10 updates have that mean reward, which every method reaches; means over seeds."),
    el("div", { class: "columns" }, curves.map(chart)),
    config.length
      ? table("Where the configs differ: files and folders by content, seeds and what is kept of a run left out", [
          { name: "key", cell: (r) => printable(r.key) },
          ...methods.map((m, i) => ({ name: m.name, wide: true, cell: (r) => printable(r.values[i]) })),
        ], config)
      : el("p", {}, "The configs say the same, but for seeds and what is kept of a run."),
    flipped.length > 0 &&
      table(`Held-out prompts that A or B alone solves, greedy (${flipped.length})`, [
        { name: "prompt", wide: true, cell: (f) => el("span", { class: "text" }, printable(f.prompt.slice(-160))) },
        { name: "solved by", cell: (f) => f.better.toUpperCase(), value: (f) => f.better },
        { name: "A", wide: true, cell: (f) => apart(f.a, f.b) },
        { name: "B", wide: true, cell: (f) => apart(f.b, f.a) },
      ], flipped),
  ];
}

let compared = 0;

const compareView = () => {
  const beside = chosen("beside").split("/").filter(Boolean);
  const pick = (name) =>
    el("label", { class: "tick" }, el("input", {
      type: "checkbox",
      checked: beside.includes(name),
      onchange: (event) => go({ beside: (event.target.checked ? [...beside, name] : beside.filter((one) => one !== name)).join("/") }),
    }), printable(name));
  return [
    el("h2", {}, "Compare"),
    names.length < 2 && el("p", {}, "Watch a folder of runs to compare them: latent-control watch runs."),
    el("div", { class: "controls", role: "group", "aria-label": "runs" }, names.slice(0, 40).map(pick)),
    el("div", { id: "comparison", "aria-live": "polite" }),
  ].filter(Boolean);
};

async function refreshComparison() {
  const mine = ++compared;
  const beside = chosen("beside").split("/").filter((name) => names.includes(name));
  trouble(null);
  if (beside.length < 2) return $("comparison").replaceChildren(el("p", { class: "soft" }, "Choose two runs or more."));
  $("comparison").replaceChildren(el("p", { class: "soft" }, "Comparing\u2026"));
  const found = await ask(`api/compare?${beside.map((name) => `run=${encodeURIComponent(name)}`).join("&")}`);
  if (mine === compared && $("comparison")) $("comparison").replaceChildren(...[comparison(found)].flat(Infinity).filter(Boolean));
}
