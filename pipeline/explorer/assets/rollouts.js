// Rollouts, and why an output came about.

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
            onclick: () => go({ step: j }),
          },
          word(data, t),
          el("small", {}, el("span", { class: "unseen" }, " code "), r.codes[j]),
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
