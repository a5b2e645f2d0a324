// Which codes carry the gain, and what each code does.

const notes = (data) => data.summary.notes.map((text) => note(printable(text)));
const writes = (data, code) => (code.contexts.length ? chips(data, [...new Set(code.contexts.map((c) => c.token))].slice(0, 3)) : NONE);
// What tells a code's choices from all others: "writes + (92 %, others 11 %), at position 3 (...)".
const inWords = (data, code) =>
  code.labels.length
    ? code.labels.map(({ kind, value, here, elsewhere }, i) => [i ? ", " : "", kind === "position" ? `at position ${value}` : [`${kind} `, chips(data, [value])], ` (${percent(here, 0)}, others ${percent(elsewhere, 0)})`])
    : NONE;
const READ_SUM = 0.01; // of the gain's own size; smaller sums say nothing about shares
const rise = (code) => code.after - code.before;

// Columns of tables whose rows are codes.
const columnsOf = (data, most = 1) => {
  const of = (name, get, show) => num(name, (k) => get(data.codes[k]), show);
  return {
    code: { name: "code", cell: (k) => codeLink(k), value: (k) => k },
    before: of("P(code) before RL", (c) => c.before, percent),
    after: of("after RL", (c) => c.after, percent),
    change: { ...of("change (pp)", rise), cell: (k) => el("span", { class: rise(data.codes[k]) >= 0 ? "up" : "down" }, signed(100 * rise(data.codes[k]), 1)) },
    advantage: of("mean advantage", (c) => c.advantage),
    contribution: of("contribution", (c) => c.gain?.mean, (x) => (x === undefined ? NONE : signed(x, 4))),
    writes: { name: "top tokens", cell: (k) => writes(data, data.codes[k]) },
    usage: of("usage", (c) => c.usage, (x) => percent(x, 2)),
    chosen: of("chosen", (c) => c.uses, (x) => x),
    health: { name: "health", cell: (k) => data.codes[k].health, value: (k) => data.codes[k].health },
    entropy: of("entropy of its tokens", (c) => c.token_entropy, (x) => fixed(x, 2)),
    strength: of("strength", (c) => c.strength, (x) => fixed(x, 2)),
    acts: of("changes the top token", (c) => c.acts, (x) => percent(x, 0)),
    words: { name: "in words", wide: true, cell: (k) => inWords(data, data.codes[k]) },
    bar: (get) => ({ name: "", cell: (k) => middleBar(get(data.codes[k]), most) }),
  };
};
const all = (data) => data.codes.map((_, k) => k);

function facts(data) {
  const s = data.summary, ends = (first, last) => `${fixed(first)} \u2192 ${fixed(last)}`;
  return tiles([
    ["training reward, first and last 10 updates", ends(s.reward_first, s.reward_last)],
    ["training success, first and last 10 updates", ends(s.success_first, s.success_last)],
    ...s.evaluation.map(([name, value]) => [`held-out success sampled, ${name}`, fixed(value)]),
    ["active codes in training rollouts", `${data.codes.filter((c) => c.health === "active").length} of ${s.num_actions}`],
    ...(s.collapse ? [["active codes that change the top token", `${s.collapse.acting} of ${s.collapse.probed} probed`], ["codebook after RL", s.collapse.verdict]] : []),
    ["code perplexity of all training rollouts", fixed(s.perplexity, 1)],
    ...(s.turns > 1 ? [["turns of an episode, mean", fixed(s.turns, 1)]] : []),
    ["rollouts read", `${s.rollouts} of ${s.stored}`],
  ]);
}

function gainView({ data }) {
  const s = data.summary;
  if (!s.gain) return withoutGain(data);
  const order = ranked(data, (c) => c.gain.mean), position = data.splits[0];
  const c = columnsOf(data, Math.max(...data.codes.map((code) => Math.abs(code.gain.mean))));
  const share = (mean) => (Math.abs(s.gain.mean) > READ_SUM ? percent(mean / s.gain.mean, 0) : NONE);
  return [
    title("Which codes carry the gain of reinforcement learning"),
    gainInWords(data, order),
    facts(data),
    notes(data),
    table("Codes by their contribution to the gain", [
      c.code, { ...c.contribution, name: "gain in reward" }, c.bar((code) => code.gain.mean),
      { name: "95 % interval", cell: (k) => spanOf(data.codes[k].gain, 4) },
      num("share of the gain", (k) => data.codes[k].gain.mean, share),
      c.before, c.after, c.change, c.advantage, c.writes,
    ], order, { sort: 1 }),
    lines("mean reward along the interpolation from the cloned to the improved policy", s.path.map((_, i) => `${Math.round((100 * (i + 0.5)) / s.path.length)} %`), [{ name: "reward", values: s.path }]),
    el("h3", {}, "Where in a response"),
    gainByPosition(data),
    heat("gain by position in the response, the 16 codes with the most", order.slice(0, 16), position.keys, position.gain, { show: (v) => signed(v, 4) }),
  ];
}

function gainInWords(data, order) {
  const s = data.summary, sure = order.filter((k) => data.codes[k].gain.low > 0);
  const share = (codes) => percent(codes.reduce((sum, k) => sum + data.codes[k].gain.mean, 0) / s.gain.mean, 0);
  const one = (k, i) => [i ? ", " : "", codeLink(k), ` ${signed(data.codes[k].gain.mean)} (top tokens `, writes(data, data.codes[k]), `, chosen ${rise(data.codes[k]) >= 0 ? "more" : "less"} after RL)`];
  return [
    p(
      `From the policy before RL to the one after it, the mean reward on held-out prompts changed by ${signed(s.gain.mean)} (95 % interval ${spanOf(s.gain)}): ` +
        `the sum of the codes' parts, estimated from ${s.path_rollouts} rollouts of policies between the two. `,
      sure.length
        ? [`${sure.length === 1 ? "One code has" : `${sure.length} codes have`} a significant contribution (95 % CI above 0)` + (s.gain.low > 0 ? ` (together ${share(sure)} of the gain)` : "") + "; the largest: ", sure.slice(0, 5).map(one), "."]
        : "No code contributes significantly (95 % CI above 0).",
    ),
    s.measured && p(reconciled(s)),
    soft("A code has a positive part when it is chosen more where it pays, or less where it costs: a code that became rarer can carry gain too. " +
      "Intervals are at 95 %, one code at a time; about one code in twenty lies outside of its interval at random."),
  ];
}

// The sum of the parts beside what the evaluation measured: how far they are apart, and whether that is more than chance.
function reconciled({ gain, measured, measured_prompts: prompts }) {
  const rest = measured.mean - gain.mean, half = Math.hypot(measured.high - measured.low, gain.high - gain.low) / 2;
  return (
    `The evaluation measured ${signed(measured.mean)} (${spanOf(measured)}) on ${prompts} held-out prompts, sampled. The parts leave ${signed(rest)} of it unexplained, ` +
    (Math.abs(rest) <= half ? `within the ${fixed(half)} that both intervals allow.` : `more than the ${fixed(half)} that both intervals allow: go by the evaluation, and by the parts for their order only.`)
  );
}

function gainByPosition(data) {
  const { keys, gain } = data.splits[0], sums = gain.map((row) => row.reduce((a, b) => a + b, 0));
  const most = keys.map((_, i) => i).sort((i, j) => sums[j] - sums[i]).slice(0, 3);
  return p("Most of the gain comes at positions ", most.map((i, n) => `${n ? ", " : ""}${keys[i]} (${signed(sums[i])})`), "; position 0 is the first token of the response.");
}

function withoutGain(data) {
  const read = data.codes[0].before !== null, c = columnsOf(data);
  return [
    title("What reinforcement learning changed"),
    facts(data),
    notes(data),
    p("Which codes carry the gain was not computed for this run. ",
      read && "What there is instead: which codes RL made more or less likely, and the mean advantage of the rollouts they were in, which is a correlation."),
    read && table("Codes by the change of their probability", [c.code, c.before, c.after, c.change, c.advantage, c.writes], all(data), { sort: 3 }),
  ];
}

function codesView({ data, code }) {
  const most = Math.max(...data.codes.map((one) => one.usage)), c = columnsOf(data);
  return [
    title(code === null ? "Codes" : `Code ${code}`),
    code !== null && codeDetail(data, code),
    el("h3", {}, "All codes"),
    soft("Usage is the share of all choices. Strength: how far the code moves the next token away from the mixture of codes that the policy had before reinforcement learning (KL, nats). " +
      "Active: used more than a tenth of an even share; an active code may do nothing: the share of its states in which it changes the top token says so."),
    table("All codes", [
      c.code, c.usage, { name: "", cell: (k) => bar(data.codes[k].usage, most, hue(k)) }, c.chosen, c.health, c.entropy, c.strength, c.acts, c.advantage, c.words,
    ], all(data), { sort: 1, chosen: (k) => k === code }),
    data.clusters.length > 0 && clustersOf(data),
    LIVE && firesPanel(code),
  ];
}

const clustersOf = (data) =>
  table("Clusters: codes that have the same top token in most states", [
    num("codes", (g) => g.codes.length, (x) => x),
    { name: "which", wide: true, cell: (g) => codesInLine(g.codes) },
    num("usage together", (g) => g.codes.reduce((sum, k) => sum + data.codes[k].usage, 0), percent),
    { name: "top tokens anywhere", cell: (g) => chips(data, g.tokens) },
  ], data.clusters);

function nearest(data, k) {
  const side = (tokens) => (tokens.length ? tokens.map(([t, x], i) => [i ? ", " : "", words(data, [t]), ` ${signed(100 * x, 1)} pp`]) : NONE);
  return table("Nearest codes, and what tells them apart", [
    { name: "code", cell: (n) => codeLink(n.code) },
    { name: "same top token", number: true, cell: (n) => percent(n.agreement, 0) },
    { name: `code ${k} makes likelier`, cell: (n) => side(n.more) },
    { name: "the other one makes likelier", cell: (n) => side(n.less) },
  ], data.codes[k].near);
}

function codeDetail(data, k) {
  const c = data.codes[k], position = data.splits[0], usage = (rows) => [{ name: `code ${k}`, values: rows.map((row) => row[k]) }];
  const grams = (name, caption, rows) =>
    el("div", {}, el("h3", {}, name), table(caption, [
      { name: "codes", cell: (g) => codesInLine(g.codes) },
      { name: "wrote", cell: (g) => words(data, g.tokens) },
      num("in better rollouts", (g) => g.high, (x) => x), num("in worse", (g) => g.low, (x) => x), num("z", (g) => g.z, (x) => fixed(x, 1)),
    ], rows));
  return panel(
    `code ${k}`,
    p(`Code ${k}: `, inWords(data, c), "."),
    tiles([
      ["usage", percent(c.usage, 2)],
      ["health", c.health],
      ["entropy of its tokens", `${fixed(c.token_entropy, 2)} nats`],
      ["mean advantage", fixed(c.advantage)],
      ["strength", c.strength === null ? NONE : `${fixed(c.strength, 2)} nats`],
      ["changes the top token", `${percent(c.acts, 0)} of its states`],
      ...(c.gain ? [["P(code) before \u2192 after RL", `${percent(c.before)} \u2192 ${percent(c.after)}`], ["contribution", `${signed(c.gain.mean, 4)} (${spanOf(c.gain, 4)})`]] : []),
    ]),
    p(link({ view: "rollouts", code: k, rollout: null, page: null }, {}, "Rollouts with this code")),
    side(
      el("div", {}, el("h3", {}, "What it does to the next token"),
        c.shifts.length
          ? table("Where it was chosen: what it raises and lowers most", [
              { name: "token", cell: (s) => words(data, [s.token]) },
              num("with the code", (s) => s.probability, percent), num("mixture before RL", (s) => s.mixture, percent), num("log shift", (s) => s.log_shift, (x) => signed(x, 2)),
              { name: "", cell: (s) => middleBar(s.probability - s.mixture, 1) },
            ], c.shifts)
          : p("Not measured."),
        c.anywhere.length > 0 && p("Its likeliest tokens at states of all codes: ", c.anywhere.map(([t, x], i) => [i ? ", " : "", words(data, [t]), ` ${percent(x)}`]))),
      el("div", {}, el("h3", {}, "Where it fires most"), table("Most frequent contexts", [
        { name: "after", cell: (x) => words(data, x.before) },
        { name: "it wrote", cell: (x) => words(data, [x.token]) },
        { name: "times", number: true, cell: (x) => x.count },
        { name: "of these by this code", number: true, cell: (x) => percent(x.share, 0) },
        { name: "example", cell: (x) => (x.rollout === null ? "" : link({ view: "rollouts", rollout: x.rollout, code: k, step: null }, {}, `rollout ${x.rollout}`)) },
      ], c.contexts)),
    ),
    side(grams("Its n-grams in better rollouts", "More reward than the mean of the group", c.better), grams("Its n-grams in worse rollouts", "Less reward than the mean of the group", c.worse)),
    c.near.length > 0 && nearest(data, k),
    LIVE && [ablationPanel(k), notePanel(`code ${k}`)],
    side(lines("usage over training", data.training.updates, usage(data.training.usage)), lines("usage by position", position.keys, usage(position.usage))),
  );
}
