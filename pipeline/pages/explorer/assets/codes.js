// Which views there are; which codes carry the gain, and what each code does.

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

const notes = (data) => data.summary.notes.map((note) => el("p", { class: "note" }, printable(note)));
const writes = (data, code) => (code.contexts.length ? chips(data, [...new Set(code.contexts.map((c) => c.token))].slice(0, 3)) : "\u2013");
// What tells a code's choices from all others: "writes + (92 %, others 11 %), at position 3 (...)".
const inWords = (data, code) =>
  code.labels.length
    ? code.labels.map(({ kind, value, here, elsewhere }, i) => [
        i ? ", " : "",
        kind === "position" ? `at position ${value}` : [`${kind} `, chips(data, [value])],
        ` (${percent(here, 0)}, others ${percent(elsewhere, 0)})`,
      ])
    : "\u2013";
const READ_SUM = 0.01; // of the gain's own size; smaller sums say nothing about shares

function facts(data) {
  const s = data.summary;
  return tiles([
    ["training reward, first and last 10 updates", `${fixed(s.reward_first)} \u2192 ${fixed(s.reward_last)}`],
    ["training success, first and last 10 updates", `${fixed(s.success_first)} \u2192 ${fixed(s.success_last)}`],
    ...s.evaluation.map(([name, value]) => [`held-out success, ${name}`, fixed(value)]),
    ["active codes in training rollouts", `${data.codes.filter((c) => c.health === "active").length} of ${s.num_actions}`],
    ...(s.collapse
      ? [
          ["active codes that change the top token", `${s.collapse.acting} of ${s.collapse.active}`],
          ["codebook after RL", s.collapse.verdict],
        ]
      : []),
    ["code perplexity of all training rollouts", fixed(s.perplexity, 1)],
    ...(s.turns > 1 ? [["turns of an episode, mean", fixed(s.turns, 1)]] : []),
    ["rollouts read", `${s.rollouts} of ${s.stored}`],
  ]);
}

const chosenColumns = (data) => [
  { name: "chosen before", number: true, cell: (k) => percent(data.codes[k].before), value: (k) => data.codes[k].before },
  { name: "after", number: true, cell: (k) => percent(data.codes[k].after), value: (k) => data.codes[k].after },
  {
    name: "change (pp)",
    number: true,
    cell: (k) => change(data.codes[k]),
    value: (k) => data.codes[k].after - data.codes[k].before,
  },
  { name: "mean advantage", number: true, cell: (k) => fixed(data.codes[k].advantage), value: (k) => data.codes[k].advantage },
  { name: "top tokens", cell: (k) => writes(data, data.codes[k]) },
];

function gainView({ data }) {
  const s = data.summary;
  if (!s.gain) return withoutGain(data);
  const order = ranked(data, (c) => c.gain.mean),
    most = Math.max(...data.codes.map((c) => Math.abs(c.gain.mean)));
  const position = data.splits[0],
    top = order.slice(0, 16);
  return [
    title("Which codes carry the gain of reinforcement learning"),
    gainInWords(data, order),
    facts(data),
    notes(data),
    table(
      "Codes by their contribution to the gain",
      [
        { name: "code", cell: (k) => codeLink(k), value: (k) => k },
        { name: "gain in reward", number: true, cell: (k) => signed(data.codes[k].gain.mean, 4), value: (k) => data.codes[k].gain.mean },
        { name: "", cell: (k) => middleBar(data.codes[k].gain.mean, most) },
        { name: "95 % interval", cell: (k) => `${signed(data.codes[k].gain.low, 4)} to ${signed(data.codes[k].gain.high, 4)}` },
        {
          name: "share of the gain",
          number: true,
          cell: (k) => (Math.abs(s.gain.mean) > READ_SUM ? percent(data.codes[k].gain.mean / s.gain.mean, 0) : "\u2013"),
          value: (k) => data.codes[k].gain.mean,
        },
        ...chosenColumns(data),
      ],
      order,
      { sort: 1 },
    ),
    lines(
      "mean reward along the interpolation from the cloned to the improved policy",
      ["before", "after"],
      [{ name: "reward", values: s.path }],
    ),
    el("h3", {}, "Where in a response"),
    gainByPosition(data),
    heatmap(
      "gain by position in the response, the 16 codes with the most",
      codeNames(top),
      position.keys,
      top.map((k) => position.gain.map((row) => row[k])),
      { show: (v) => signed(v, 4), codes: top },
    ),
  ];
}

function gainInWords(data, order) {
  const s = data.summary,
    sure = order.filter((k) => data.codes[k].gain.low > 0);
  const rose = (k) => data.codes[k].after >= data.codes[k].before;
  const share = (codes) => percent(codes.reduce((sum, k) => sum + data.codes[k].gain.mean, 0) / s.gain.mean, 0);
  return [
    el(
      "p",
      {},
      `From the policy before RL to the one after it, the mean reward on held-out prompts changed by ${signed(s.gain.mean)} ` +
        `(95 % interval ${signed(s.gain.low)} to ${signed(s.gain.high)}): the sum of the codes' parts, estimated from ` +
        `${s.path_rollouts} rollouts of policies between the two. `,
      sure.length
        ? [
            `${sure.length === 1 ? "One code has" : `${sure.length} codes have`} a significant contribution (95 % CI above 0)` +
              (s.gain.low > 0 ? ` (together ${share(sure)} of the gain)` : "") +
              "; the largest: ",
            sure
              .slice(0, 5)
              .map((k, i) => [
                i ? ", " : "",
                codeLink(k),
                ` ${signed(data.codes[k].gain.mean)} (top tokens `,
                writes(data, data.codes[k]),
                `, chosen ${rose(k) ? "more" : "less"} after RL)`,
              ]),
            ".",
          ]
        : "No code contributes significantly (95 % CI above 0).",
    ),
    s.measured && el("p", {}, reconciled(s)),
    el(
      "p",
      { class: "soft" },
      "A code has a positive part when it is chosen more where it pays, or less where it costs: a code that became rarer can carry gain too. " +
        "Intervals are at 95 %, one code at a time; about one code in twenty lies outside of its interval at random.",
    ),
  ];
}

// The sum of the parts beside what the evaluation measured: how far they are apart, and whether that is more than chance.
function reconciled({ gain, measured, measured_prompts: prompts }) {
  const rest = measured.mean - gain.mean,
    half = Math.hypot(measured.high - measured.low, gain.high - gain.low) / 2;
  return (
    `The evaluation measured ${signed(measured.mean)} (${signed(measured.low)} to ${signed(measured.high)}) on ${prompts} held-out prompts, sampled. ` +
    `The parts leave ${signed(rest)} of it unexplained, ` +
    (Math.abs(rest) <= half ? `within the ${fixed(half)} that both intervals allow.` : `more than the ${fixed(half)} that both intervals allow: go by the evaluation, and by the parts for their order only.`)
  );
}

function gainByPosition(data) {
  const { keys, gain } = data.splits[0],
    sums = gain.map((row) => row.reduce((a, b) => a + b, 0));
  const most = keys.map((_, i) => i).sort((i, j) => sums[j] - sums[i]);
  return el(
    "p",
    {},
    "Most of the gain comes at positions ",
    most.slice(0, 3).map((i, n) => `${n ? ", " : ""}${keys[i]} (${signed(sums[i])})`),
    "; position 0 is the first token of the response.",
  );
}

function withoutGain(data) {
  const read = data.codes[0].before !== null;
  return [
    title("What reinforcement learning changed"),
    facts(data),
    notes(data),
    el(
      "p",
      {},
      "Which codes carry the gain was not computed for this run. ",
      read &&
        "What there is instead: which codes RL made more or less likely, and the mean advantage of the rollouts they were in, which is a correlation.",
    ),
    read
      ? table(
          "Codes by the change of their probability",
          [{ name: "code", cell: (k) => codeLink(k), value: (k) => k }, ...chosenColumns(data)],
          data.codes.map((_, k) => k),
          { sort: 3 },
        )
      : null,
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
      { name: "changes the top token", number: true, cell: (k) => percent(data.codes[k].acts, 0), value: (k) => data.codes[k].acts },
      { name: "mean advantage", number: true, cell: (k) => fixed(data.codes[k].advantage), value: (k) => data.codes[k].advantage },
      { name: "in words", wide: true, cell: (k) => inWords(data, data.codes[k]) },
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
        "had before reinforcement learning (KL, nats). Active: used more than a tenth of an even share; an active code may do nothing: " +
        "the share of its states in which it changes the top token says so.",
    ),
    all,
    LIVE ? firesPanel(code) : null,
  ];
}

function nearest(data, k) {
  const side = (tokens) => (tokens.length ? tokens.map(([t, p], i) => [i ? ", " : "", words(data, [t]), ` ${signed(100 * p, 1)} pp`]) : "\u2013");
  return table(
    "Nearest codes, and what tells them apart",
    [
      { name: "code", cell: (n) => codeLink(n.code) },
      { name: "same top token", number: true, cell: (n) => percent(n.agreement, 0) },
      { name: `code ${k} makes likelier`, cell: (n) => side(n.more) },
      { name: "the other one makes likelier", cell: (n) => side(n.less) },
    ],
    data.codes[k].near,
  );
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
      ["changes the top token", `${percent(c.acts, 0)} of its states`],
      ...(c.gain
        ? [
            ["P(code) before \u2192 after RL", `${percent(c.before)} \u2192 ${percent(c.after)}`],
            ["contribution", `${signed(c.gain.mean, 4)} (${signed(c.gain.low, 4)} to ${signed(c.gain.high, 4)})`],
          ]
        : []),
    ]),
    el("p", {}, `Code ${k}: `, inWords(data, c), "."),
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
    c.near.length ? nearest(data, k) : null,
    LIVE ? [ablationPanel(k), notePanel(`code ${k}`)] : null,
    el(
      "div",
      { class: "columns" },
      lines("usage over training", data.training.updates, [
        { name: `code ${k}`, values: data.training.usage.map((row) => row[k]) },
      ]),
      lines("usage by position", position.keys, [{ name: `code ${k}`, values: position.usage.map((row) => row[k]) }]),
    ),
  );
}
