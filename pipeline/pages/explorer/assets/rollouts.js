// The rollouts of the page.

const LISTED = 64; // tokens of a rollout in the list; all are in its own view
const SORTS = [
  ["update", "latest first", (a, b) => b.update - a.update],
  ["reward", "reward, best first", (a, b) => b.reward - a.reward],
  ["worst", "reward, worst first", (a, b) => a.reward - b.reward],
  ["advantage", "advantage", (a, b) => b.advantage - a.advantage],
  ["length", "length", (a, b) => b.tokens.length - a.tokens.length],
];
const OUTCOMES = [
  ["all", "all", () => true],
  ["good", "successes", (r) => r.success],
  ["bad", "failures", (r) => !r.success],
  ["explained", "with counterfactuals", (_, explained) => explained],
];

function rolloutsView(now) {
  const { data, code, rollout, step, sort, outcome, page } = now, own = new Set(data.why.map((w) => w.rollout));
  const later = data.rollouts[rollout] && onDemand[data.rollouts[rollout].id], explained = (i) => own.has(i) || data.rollouts[i].id in onDemand;
  const ofName = (table, name) => table.find(([one]) => one === name)[2], wanted = ofName(OUTCOMES, outcome), order = ofName(SORTS, sort);
  const found = data.rollouts.map((r, i) => [r, i]).filter(([r, i]) => wanted(r, explained(i)) && (code === null || r.codes.includes(code)));
  found.sort(([a, i], [b, j]) => order(a, b) || i - j);
  const pages = Math.max(1, Math.ceil(found.length / PER_PAGE)), here = Math.min(page, pages - 1);
  const pick = (label, name, options, value) => choose(label, options, value, { "data-key": `select ${label}`, onchange: (event) => go({ [name]: event.target.value, page: null }) });
  const pager = (where) =>
    el("div", { class: "pager" },
      here > 0 && link({ page: here - 1 }, { "data-key": `back ${where}` }, "Back"),
      `${found.length} rollouts, page ${here + 1} of ${pages}`,
      here + 1 < pages && link({ page: here + 1 }, { "data-key": `next ${where}` }, "Next"));
  const one = ([r, i]) =>
    el("li", { class: i === rollout && "chosen" },
      link({ rollout: i, step: null }, {}, `rollout ${i}`), " ", verdictOf(r.success, `reward ${fixed(r.reward, 2)}`),
      el("span", { class: "soft" }, `, ${signed(r.advantage, 2)} advantage (reward \u2212 group mean), update ${r.update}${explained(i) ? ", counterfactuals" : ""} `),
      texts(data.prompts[r.prompt].slice(-160)), " ", listed(data, r, i));
  return [
    title(rollout === null ? "Rollouts" : `Rollout ${rollout}`),
    rollout !== null && rolloutDetail(later ? { data: later, rollout: 0, step } : now),
    el("div", { class: "controls" },
      pick("with code", "code", [["", "any"], ...data.codes.map((c, k) => [k, `${k} (${percent(c.usage)})`])], code),
      pick("sorted by", "sort", SORTS, sort),
      pick("show", "outcome", OUTCOMES, outcome)),
    soft("Each token stands over the code that produced it; click one (or reach it by Tab and the arrow keys) to see only rollouts with its code." +
      (data.summary.turns > 1 ? " Observations between an episode's turns are set apart in grey: the policy did not choose it." : "")),
    pager("above"),
    el("ol", { class: "rollouts" }, found.slice(here * PER_PAGE, (here + 1) * PER_PAGE).map(one)),
    pager("below"),
  ];
}

function listed(data, r, i) {
  const more = r.tokens.length - LISTED;
  const button = (j) => tokenButton(data, r, j, { "data-key": `token ${i} ${j}`, onclick: () => go({ code: r.codes[j], page: null }) });
  return [
    strip(`tokens of rollout ${i}, each with its code`, written(data, r, Math.min(r.tokens.length, LISTED), button)),
    more > 0 && link({ rollout: i, step: null }, { "data-key": `rest ${i}` }, `and ${more} more tokens`),
  ];
}
