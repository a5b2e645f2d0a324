// Codes over training, where they are chosen, and the policy before and after RL.

function collapseInWords({ collapse: c, num_actions: n }) {
  const rows = [
    ["effective codes altogether: exp(marginal entropy)", ...c.marginal.map((x) => fixed(x, 1))],
    ["effective codes open in a state: exp(mean entropy)", ...c.state.map((x) => fixed(x, 2))],
    [`active codes of ${n}`, "", c.active],
    [`of ${c.probed} probed ones, change the top token somewhere`, "", c.acting],
    ["active codes left when near-duplicates (same top token in 99 % of the states) count once", "", c.distinct],
    ["strength: KL(token | code, mixture before RL), nats", "", fixed(c.strength, 2)],
  ];
  return [
    el("h3", {}, `Did RL collapse the codebook? ${c.verdict[0].toUpperCase()}${c.verdict.slice(1)}`),
    c.reasons.length > 0 && p(c.reasons.join("; "), "."),
    table("Both policies at the same choices, codes at their probed states", ["measure", "before RL", "after RL"].map((name, i) => ({ name, head: i === 0, number: i > 0, cell: (row) => row[i] })), rows),
  ];
}

function trainingView({ data }) {
  const t = data.training, same = t.reward.every((r, i) => r === t.success[i]), reward = { name: "reward", values: t.reward };
  return [
    title("Codes over training"),
    data.summary.collapse && collapseInWords(data.summary),
    p(`Code perplexity of an update's rollouts went from ${fixed(t.perplexity[0], 1)} to ${fixed(t.perplexity.at(-1), 1)} of ${data.summary.num_actions}.`),
    side(
      lines("code perplexity by update", t.updates, [{ name: "perplexity", values: t.perplexity }]),
      same ? lines("reward by update (the share of successes is the same)", t.updates, [reward]) : lines("reward and success by update", t.updates, [reward, { name: "success", values: t.success }]),
    ),
    heat("usage of each code by update", ranked(data, (c) => c.usage), t.updates, t.usage),
  ];
}

const splitChoice = (data, split) =>
  el("div", { class: "controls" }, choose("by", data.splits.map((s, i) => [i, s.name]), split, { "data-key": "split", onchange: (event) => go({ split: event.target.value }) }));

const explained = (name) =>
  ({ position: "Position is the place of the token in its response, from 0.", turn: "Turn is the response of the episode, from 0.", task: "Task is what the prompt is from." })[name] ?? `${name} is a field of the prompts' metadata.`;

function whereView({ data, split }) {
  const s = data.splits[split];
  return [
    title("Where codes are chosen"),
    splitChoice(data, split),
    soft(`Share of each code among the choices of a column, which has ${Math.min(...s.counts)} to ${Math.max(...s.counts)} of them. ` + explained(s.name)),
    heat(`usage by ${s.name}`, ranked(data, (c) => c.usage), s.keys, s.usage),
  ];
}

function policyView({ data, split }) {
  const s = data.splits[split];
  if (!s.before.length) return [title("The policy before and after RL"), notes(data), p("Not computed.")];
  const order = ranked(data, rise), c = columnsOf(data, Math.max(...data.codes.map((code) => Math.abs(rise(code)))));
  const changes = s.after.map((row, i) => row.map((x, k) => x - s.before[i][k])), points = (x) => `${signed(100 * x, 1)} pp`;
  const where = (k) => {
    const sign = rise(data.codes[k]) >= 0 ? 1 : -1, best = changes.reduce((at, row, i) => (sign * row[k] > sign * changes[at][k] ? i : at), 0);
    return `${s.keys[best]} (${points(changes[best][k])})`;
  };
  return [
    title("The policy before and after reinforcement learning"),
    soft("Mean probability of each code over the same choices, those of the rollouts on this page, under both policies. Most at: where it changed most in the direction it changed as a whole."),
    splitChoice(data, split),
    table("Codes that rose and fell", [
      c.code, c.before, c.after, c.change, c.bar(rise), { name: `most at ${s.name}`, cell: where }, data.summary.gain ? c.contribution : c.advantage, c.writes,
    ], order, { sort: 3 }),
    heat(`change of probability by ${s.name}`, order, s.keys, changes, { show: points }),
  ];
}
