// Why an output came about: a rollout with every choice explained.

// The first `end` tokens: `one(place)` for those that the policy chose, blocks of text for what an episode observed between.
function written(data, r, end, one) {
  const found = [];
  for (let j = 0, last; j < end; j = last) {
    last = j + 1;
    if (r.codes[j] >= 0) {
      found.push(one(j));
      continue;
    }
    while (last < end && r.codes[last] < 0) last += 1;
    found.push(el("span", { class: "text seen" }, el("span", { class: "unseen" }, "observation: "), seenWords(data, r.tokens.slice(j, last))));
  }
  return found;
}

const tokenButton = (data, r, j, attributes) => tokenOf(data.vocabulary[r.tokens[j]], r.codes[j], attributes);

function rolloutDetail({ data, rollout, step }) {
  const r = data.rollouts[rollout], why = data.why.find((w) => w.rollout === rollout);
  const steps = new Map(why ? why.steps.map((s) => [s.position, s]) : []);
  const first = why && [...decisive(why).map(([s]) => s), ...why.steps.filter((s) => s.endings.length), why.steps[0]][0];
  const open = why && (steps.has(step) ? step : first.position);
  const button = (j) =>
    tokenButton(data, r, j, {
      "data-key": `step ${j}`, "aria-pressed": why && String(j === open), disabled: why && !steps.has(j),
      onclick: () => go(why ? { step: j } : { view: "codes", code: r.codes[j], rollout: null, page: null }),
    });
  const chance = (name, values) => num(name, (j) => values[j] ?? -1, (x) => (x < 0 ? "" : `${x} %`));
  return panel(
    `rollout ${rollout}`,
    tiles([
      ["reward", fixed(r.reward, 3)],
      ...(r.advantage === null ? [] : [["advantage (reward \u2212 group mean)", signed(r.advantage)]]),
      ["success", r.success ? "yes" : "no"],
      ...(data.summary.heldout ? [] : [["update", r.update]]),
      ...(r.turn_rewards.length ? [["reward of each turn", r.turn_rewards.map((x) => fixed(x, 2)).join(", ")]] : []),
    ]),
    soft(printable(r.id)),
    el("p", { class: "text" }, printable(data.prompts[r.prompt])),
    strip(`tokens of rollout ${rollout}, each with its code`, written(data, r, r.tokens.length, button), why ? [...steps.keys()].indexOf(open) : 0),
    why
      ? [decisiveInWords(data, r, why), el("h3", {}, `Why ${word(data, r.tokens[open])} at token ${open}`), stepInWords(data, r, steps.get(open)), stepDetail(data, r, steps.get(open))]
      : soft("No counterfactuals computed for this rollout (show: those with counterfactuals); a click on a token leads to its code."),
    !why && LIVE && whyButton(r),
    folded("Every token: P(code)", () =>
      table("P(code) of the code that was chosen", [
        { name: "token", cell: (j) => words(data, [r.tokens[j]]) },
        { name: "code", cell: (j) => codeLink(r.codes[j]) },
        chance("when sampled", r.chances), chance("before RL", r.before), chance("after RL", r.after),
      ], r.tokens.map((_, j) => j).filter((j) => r.codes[j] >= 0))),
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
  const played = why.steps.filter((s) => s.endings.length > 1).length, found = decisive(why);
  const one = ([s, e], i) => {
    const own = s.masses.find((m) => m[0] === r.tokens[s.position]);
    return [
      i ? "; " : "", link({ step: s.position }, { "data-key": `decisive ${s.position}` }, `token ${s.position}`), ": ", chips(data, [r.tokens[s.position]]),
      own && ` (probability ${percent(own[2], 0)} after RL)`, " rather than ", chips(data, [e.tokens[0]]),
      `, with which the reward would be ${fixed(e.reward, 2)} instead of ${fixed(s.endings[0].reward, 2)}`,
    ];
  };
  if (!played) return null;
  return found.length
    ? p("Decisive tokens (counterfactual, greedy continuation after RL): ", found.map(one), ".")
    : p(`No decisive token: at the ${played} places with counterfactual continuations (greedy, after RL) the reward stays the same.`);
}

// What the tables below say, in a sentence or three.
function stepInWords(data, r, step) {
  const token = r.tokens[step.position], code = r.codes[step.position], own = step.masses.find((m) => m[0] === token);
  const rival = step.masses.find((m) => m[0] !== token), ending = rival && step.endings.slice(1).find((e) => e.tokens[0] === rival[0]);
  const chances = (m) => `${percent(m[1], 0)} before RL, ${percent(m[2], 0)} after it`, differs = ending ? against(step, ending) : null;
  return p(
    own
      ? ["The codes that write ", chips(data, [token]), ` here have a total probability of ${chances(own)} (${own[3]} codes; code ${code} is the one that was drawn). `]
      : `Code ${code} was drawn; what it wrote is no code's likeliest token here. `,
    rival ? ["The likeliest other token is ", chips(data, [rival[0]]), `: ${chances(rival)}. `] : "The codes compared agree: each of them would have written it. ",
    differs !== null &&
      `Going on greedily from here, the policy after RL gets reward ${fixed(ending.reward, 2)} with ` +
        (Math.abs(differs) > TOLD ? `it, and ${fixed(step.endings[0].reward, 2)} with the chosen one.` : "either."),
  );
}

function stepDetail(data, r, step) {
  const token = r.tokens[step.position], taken = r.codes[step.position];
  const at = (t) => (t === token ? el("strong", {}, words(data, [t])) : words(data, [t]));
  const difference = (e) => (e === step.endings[0] || against(step, e) === null ? "" : signed(against(step, e), 2));
  return [
    side(
      table("P(token), over all codes that produce it", [
        { name: "token", cell: (m) => [at(m[0]), m[0] === token ? " (chosen)" : ""] },
        num("before RL", (m) => m[1], percent), num("after RL", (m) => m[2], percent),
        { name: "", cell: (m) => bar(m[2], 1) },
        { name: "codes", number: true, cell: (m) => m[3] },
      ], step.masses),
      table("P(code) under the policy, and the token of each code", [
        { name: "code", cell: (o) => [codeLink(o.code), o.code === taken ? " (chosen)" : ""] },
        num("before RL", (o) => o.before, percent), num("after RL", (o) => o.after, percent),
        { name: "", cell: (o) => bar(o.after, 1, hue(o.code)) },
        { name: "token", cell: (o) => at(o.token) },
        num("P(token | code)", (o) => o.certainty, (x) => percent(x, 0)),
      ], step.options),
    ),
    step.endings.length
      ? table("Counterfactual continuations (greedy, after RL)", [
          { name: "code", cell: (e) => [codeLink(e.code), e === step.endings[0] ? " (chosen)" : ""] },
          { name: "reward", number: true, cell: (e) => verdictOf(e.success, e.reward === null ? "not judged" : fixed(e.reward, 2)), value: (e) => e.reward },
          { name: "against the chosen one", number: true, cell: difference },
          { name: "from here on", wide: true, cell: (e) => words(data, e.tokens) },
        ], step.endings)
      : soft(data.summary.turns > 1
          ? "Counterfactual continuations are not computed for episodes of several turns: the environment would have to be stepped again."
          : "No other token was likely enough here for a counterfactual continuation."),
  ];
}
