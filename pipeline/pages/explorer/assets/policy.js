// Codes over training, where they are chosen, and the policy before and after RL.

function collapseInWords({ collapse: c, num_actions: n }) {
  const row = (measure, before, after) => ({ measure, before, after });
  return [
    el("h3", {}, `Did RL collapse the codebook? ${c.verdict[0].toUpperCase()}${c.verdict.slice(1)}`),
    c.reasons.length ? el("p", {}, c.reasons.join("; "), ".") : null,
    table(
      "Both policies at the same choices, codes at their probed states",
      [
        { name: "measure", cell: (r) => r.measure },
        { name: "before RL", number: true, cell: (r) => r.before },
        { name: "after RL", number: true, cell: (r) => r.after },
      ],
      [
        row("effective codes altogether: exp(marginal entropy)", ...c.marginal.map((x) => fixed(x, 1))),
        row("effective codes open in a state: exp(mean entropy)", ...c.state.map((x) => fixed(x, 2))),
        row(`active codes of ${n}`, "", c.active),
        row("of these, change the top token somewhere", "", c.acting),
        row("of these, left when near-duplicates (same top token in 99 % of the states) count once", "", c.distinct),
        row("strength: KL(token | code, mixture before RL), nats", "", fixed(c.strength, 2)),
      ],
    ),
  ];
}

function trainingView({ data }) {
  const t = data.training,
    order = ranked(data, (c) => c.usage),
    final = t.perplexity[t.perplexity.length - 1];
  return [
    title("Codes over training"),
    data.summary.collapse ? collapseInWords(data.summary) : null,
    el(
      "p",
      {},
      `Code perplexity of an update's rollouts, the effective number of codes in use, went from ${fixed(t.perplexity[0], 1)} to ${fixed(final, 1)} ` +
        `of ${data.summary.num_actions}.`,
    ),
    el(
      "div",
      { class: "columns" },
      lines("code perplexity by update", t.updates, [{ name: "perplexity", values: t.perplexity }]),
      t.reward.every((r, i) => r === t.success[i])
        ? lines("reward by update (the share of successes is the same)", t.updates, [
            { name: "reward", values: t.reward },
          ])
        : lines("reward and success by update", t.updates, [
            { name: "reward", values: t.reward },
            { name: "success", values: t.success },
          ]),
    ),
    heatmap(
      "usage of each code by update",
      codeNames(order),
      t.updates,
      order.map((k) => t.usage.map((row) => row[k])),
      { codes: order },
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

const explained = (name) =>
  ({
    position: "Position is the place of the token in its response, from 0.",
    turn: "Turn is the response of the episode, from 0.",
    task: "Task is what the prompt is from.",
  })[name] ?? `${name} is a field of the prompts' metadata.`;

function whereView({ data, split }) {
  const s = data.splits[split],
    order = ranked(data, (c) => c.usage);
  return [
    title("Where codes are chosen"),
    splitChoice(data, split),
    el(
      "p",
      { class: "soft" },
      `Share of each code among the choices of a column, which has ${Math.min(...s.counts)} to ${Math.max(...s.counts)} of them. ` +
        explained(s.name),
    ),
    heatmap(
      `usage by ${s.name}`,
      codeNames(order),
      s.keys,
      order.map((k) => s.usage.map((row) => row[k])),
      { codes: order },
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
    el(
      "p",
      { class: "soft" },
      "Mean probability of each code over the same choices, those of the rollouts on this page, under both policies. " +
        "Most at: where it changed most in the direction it changed as a whole.",
    ),
    splitChoice(data, split),
    table(
      "Codes that rose and fell",
      [
        { name: "code", cell: (k) => codeLink(k), value: (k) => k },
        { name: "before", number: true, cell: (k) => percent(data.codes[k].before), value: (k) => data.codes[k].before },
        { name: "after", number: true, cell: (k) => percent(data.codes[k].after), value: (k) => data.codes[k].after },
        {
          name: "change (pp)",
          number: true,
          cell: (k) => change(data.codes[k]),
          value: (k) => data.codes[k].after - data.codes[k].before,
        },
        { name: "", cell: (k) => middleBar(data.codes[k].after - data.codes[k].before, most) },
        { name: `most at ${s.name}`, cell: where },
        ...(data.summary.gain
          ? [
              {
                name: "contribution",
                number: true,
                cell: (k) => signed(data.codes[k].gain.mean, 4),
                value: (k) => data.codes[k].gain.mean,
              },
            ]
          : [{ name: "mean advantage", number: true, cell: (k) => fixed(data.codes[k].advantage), value: (k) => data.codes[k].advantage }]),
        { name: "top tokens", cell: (k) => writes(data, data.codes[k]) },
      ],
      order,
      { sort: 3 },
    ),
    heatmap(
      `change of probability by ${s.name}`,
      codeNames(order),
      s.keys,
      order.map((k) => s.after.map((row, i) => row[k] - s.before[i][k])),
      { show: (v) => signed(100 * v, 1) + " points", codes: order },
    ),
  ];
}
