// Rollouts, and why an output came about.

const LISTED = 64; // tokens of a rollout in the list; all are in its own view

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
          ["explained", "with counterfactuals"],
        ],
        outcome,
      ),
    ),
    el(
      "p",
      { class: "soft" },
      "Each token stands over the code that produced it; click one (or reach it by Tab and the arrow keys) to see only rollouts with its code." +
        (data.summary.turns > 1
          ? " Observations between an episode's turns are set apart in grey: the policy did not choose it."
          : ""),
    ),
    pager("above"),
    el(
      "ol",
      { class: "rollouts" },
      found
        .slice(here * PER_PAGE, (here + 1) * PER_PAGE)
        .map(([r, i]) =>
          el(
            "li",
            { class: i === rollout && "chosen" },
            link({ rollout: i, step: null }, {}, `rollout ${i}`),
            " ",
            el("span", { class: r.success ? "good" : "bad" }, `reward ${fixed(r.reward, 2)}`),
            el(
              "span",
              { class: "soft" },
              `, ${signed(r.advantage, 2)} advantage (reward \u2212 group mean), update ${r.update}${explained.has(i) ? ", counterfactuals" : ""} `,
            ),
            el("span", { class: "text" }, printable(data.prompts[r.prompt].slice(-160))),
            " ",
            listed(data, r, i),
          ),
        ),
    ),
    pager("below"),
  ];
}

// The first `end` tokens: `one(place)` for those that the policy chose, blocks of text for what an episode observed between.
function written(data, r, end, one) {
  const found = [];
  for (let j = 0; j < end;) {
    if (r.codes[j] >= 0) {
      found.push(one(j));
      j += 1;
      continue;
    }
    let last = j;
    while (last < end && r.codes[last] < 0) last += 1;
    found.push(
      el("span", { class: "text seen" }, el("span", { class: "unseen" }, "observation: "), seenWords(data, r.tokens.slice(j, last))),
    );
    j = last;
  }
  return found;
}

const tokenButton = (data, r, j, attributes) =>
  el(
    "button",
    { type: "button", class: "token", "--hue": hue(r.codes[j]), ...attributes },
    `${word(data, r.tokens[j])} `,
    el("small", {}, r.codes[j]),
  );

function listed(data, r, i) {
  const more = r.tokens.length - LISTED;
  const children = written(data, r, Math.min(r.tokens.length, LISTED), (j) =>
    tokenButton(data, r, j, { "data-key": `token ${i} ${j}`, onclick: () => go({ code: r.codes[j], page: null }) }),
  );
  return [
    strip(`tokens of rollout ${i}, each with its code`, children),
    more > 0 && link({ rollout: i, step: null }, { "data-key": `rest ${i}` }, `and ${more} more tokens`),
  ];
}

function rolloutDetail({ data, rollout, step }) {
  const r = data.rollouts[rollout],
    why = data.why.find((w) => w.rollout === rollout);
  const steps = new Map(why ? why.steps.map((s) => [s.position, s]) : []);
  const first = why && [...decisive(why).map(([s]) => s), ...why.steps.filter((s) => s.endings.length), why.steps[0]][0];
  const open = why && (steps.has(step) ? step : first.position);
  const tokens = strip(
    `tokens of rollout ${rollout}, each with its code`,
    written(data, r, r.tokens.length, (j) =>
      tokenButton(data, r, j, {
        "data-key": `step ${j}`,
        "aria-pressed": why && String(j === open),
        disabled: why && !steps.has(j),
        onclick: () => go(why ? { step: j } : { view: "codes", code: r.codes[j], rollout: null, page: null }),
      }),
    ),
    why ? [...steps.keys()].indexOf(open) : 0,
  );
  const chance = (values, j) => (values.length && values[j] >= 0 ? `${values[j]} %` : "");
  return el(
    "section",
    { class: "panel", "aria-label": `rollout ${rollout}` },
    tiles([
      ["reward", fixed(r.reward, 3)],
      ["advantage (reward \u2212 group mean)", signed(r.advantage)],
      ["success", r.success ? "yes" : "no"],
      ["update", r.update],
      ...(r.turn_rewards.length ? [["reward of each turn", r.turn_rewards.map((x) => fixed(x, 2)).join(", ")]] : []),
    ]),
    el("p", { class: "soft" }, printable(r.id)),
    el("p", { class: "text" }, printable(data.prompts[r.prompt])),
    tokens,
    why ? decisiveInWords(data, r, why) : null,
    why
      ? el(
          "div",
          {},
          el("h3", {}, `Why ${word(data, r.tokens[open])} at token ${open}`),
          stepInWords(data, r, steps.get(open)),
          stepDetail(data, r, steps.get(open)),
        )
      : el("p", { class: "soft" }, "No counterfactuals computed for this rollout (show: those with counterfactuals); a click on a token leads to its code."),
    el(
      "details",
      {},
      el("summary", {}, "Every token: P(code)"),
      table(
        "Chances of the code that was chosen",
        [
          { name: "token", cell: (j) => words(data, [r.tokens[j]]) },
          { name: "code", cell: (j) => codeLink(r.codes[j]) },
          { name: "when sampled", number: true, cell: (j) => chance(r.chances, j), value: (j) => r.chances[j] },
          { name: "before RL", number: true, cell: (j) => chance(r.before, j), value: (j) => r.before[j] ?? -1 },
          { name: "after RL", number: true, cell: (j) => chance(r.after, j), value: (j) => r.after[j] ?? -1 },
        ],
        r.tokens.map((_, j) => j).filter((j) => r.codes[j] >= 0),
      ),
    ),
  );
}

// How much another reward the ending has than that of the chosen code, null where either could not be judged.
const against = (step, e) => (e.reward === null || step.endings[0].reward === null ? null : e.reward - step.endings[0].reward);
const TOLD = 1e-9;

// The choices at which another token would have ended with another reward: [[step, the ending that differs most]].
function decisive(why) {
  const differs = (s, e) => Math.abs(against(s, e) ?? 0);
  return why.steps
    .map((s) => [s, s.endings.slice(1).reduce((a, b) => (a && differs(s, a) >= differs(s, b) ? a : b), null)])
    .filter(([s, e]) => e && differs(s, e) > TOLD);
}

function decisiveInWords(data, r, why) {
  const played = why.steps.filter((s) => s.endings.length > 1).length,
    found = decisive(why);
  if (!played) return null;
  const one = ([s, e], i) => {
    const own = s.masses.find((m) => m[0] === r.tokens[s.position]);
    return [
      i ? "; " : "",
      link({ step: s.position }, { "data-key": `decisive ${s.position}` }, `token ${s.position}`),
      ": ",
      chips(data, [r.tokens[s.position]]),
      own && ` (probability ${percent(own[2], 0)} after RL)`,
      " rather than ",
      chips(data, [e.tokens[0]]),
      `, with which the reward would be ${fixed(e.reward, 2)} instead of ${fixed(s.endings[0].reward, 2)}`,
    ];
  };
  return el(
    "p",
    {},
    found.length
      ? ["Decisive tokens (counterfactual, greedy continuation after RL): ", found.map(one), "."]
      : `No decisive token: at the ${played} places with counterfactual continuations (greedy, after RL) the reward stays the same.`,
  );
}

// What the tables below say, in a sentence or three.
function stepInWords(data, r, step) {
  const token = r.tokens[step.position],
    code = r.codes[step.position];
  const own = step.masses.find((m) => m[0] === token),
    rivals = step.masses.filter((m) => m[0] !== token);
  const moved = (m) => `${percent(m[1], 0)} before RL, ${percent(m[2], 0)} after it`;
  const rival = rivals[0];
  const ending = rival && step.endings.slice(1).find((e) => e.tokens[0] === rival[0]);
  const differs = ending && against(step, ending);
  return el(
    "p",
    {},
    own
      ? [
          "The codes that write ",
          chips(data, [token]),
          ` here have a total probability of ${moved(own)} (${own[3]} codes; code ${code} is the one that was drawn). `,
        ]
      : `Code ${code} was drawn; what it wrote is no code's likeliest token here. `,
    rival
      ? ["The likeliest other token is ", chips(data, [rival[0]]), `: ${moved(rival)}. `]
      : "The codes compared agree: each of them would have written it. ",
    ending && differs !== null
      ? "Going on greedily from here, the policy after RL " +
          (Math.abs(differs) > TOLD
            ? `gets reward ${fixed(ending.reward, 2)} with it, and ${fixed(step.endings[0].reward, 2)} with the chosen one.`
            : `gets reward ${fixed(ending.reward, 2)} with either.`)
      : null,
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
        "P(code) under the policy, and the token of each code",
        [
          { name: "code", cell: (o) => [codeLink(o.code), o.code === chosen ? " (chosen)" : ""] },
          { name: "before RL", number: true, cell: (o) => percent(o.before), value: (o) => o.before },
          { name: "after RL", number: true, cell: (o) => percent(o.after), value: (o) => o.after },
          { name: "", cell: (o) => bar(o.after, 1, hue(o.code)) },
          { name: "token", cell: (o) => at(o.token) },
          { name: "P(token | code)", number: true, cell: (o) => percent(o.certainty, 0), value: (o) => o.certainty },
        ],
        step.options,
      ),
    ),
    step.endings.length
      ? table(
          "Counterfactual continuations (greedy, after RL)",
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
              cell: (e) => (e === step.endings[0] || against(step, e) === null ? "" : signed(against(step, e), 2)),
            },
            { name: "from here on", wide: true, cell: (e) => words(data, e.tokens) },
          ],
          step.endings,
        )
      : el(
          "p",
          { class: "soft" },
          data.summary.turns > 1
            ? "Counterfactual continuations are not computed for episodes of several turns: the environment would have to be stepped again."
            : "No other token was likely enough here for a counterfactual continuation.",
        ),
  );
}
