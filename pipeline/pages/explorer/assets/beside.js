// Two runs side by side.

function compareView() {
  const [a, b] = RUNS, same = a.summary.world === b.summary.world, [ours, theirs] = RUNS.map((run) => columnsOf(run));
  const other = (k) => (same ? [k, 1] : a.similar[k]), at = (column) => ({ ...column, value: column.value && ((k) => column.value(other(k)[0])), cell: (k) => column.cell(other(k)[0]) });
  const facing = (name, data) => el("div", {}, el("h3", {}, `${name}: ${printable(data.summary.run)}`), data.summary.gain && p(`Gain along the path: ${signed(data.summary.gain.mean)}.`), facts(data));
  const most = (value) => Math.max(...RUNS.map((run) => value(run).length));
  const both = (what, value) => lines(what, Array.from({ length: most(value) }, (_, i) => `${i + 1} of ${most(value)}`), RUNS.map((run, i) => ({ name: `${"AB"[i]} ${printable(run.summary.run)}`, values: value(run) })));
  return [
    title(`${printable(a.summary.run)} beside ${printable(b.summary.run)}`),
    side(facing("A", a), facing("B", b)),
    side(both("reward over training", (r) => r.training.reward), both("code perplexity over training", (r) => r.training.perplexity)),
    p(same
      ? "Both runs have one codebook: a code means the same in both."
      : "The runs have separate codebooks: each code of A is matched with the code of B with the most similar top tokens (overlap of the tokens they produced in rollouts)."),
    table("Matched codes", [
      { name: "A", cell: (k) => codeLink(k, { run: 0 }), value: (k) => k }, ours.writes, ours.usage, ours.contribution,
      { name: "B", cell: (k) => codeLink(other(k)[0], { run: 1 }), value: (k) => other(k)[0] },
      num("overlap", (k) => other(k)[1], (x) => percent(x, 0)), at(theirs.writes), at(theirs.usage), at(theirs.contribution),
    ], all(a), { sort: 2 }),
    sharedPrompts(a, b),
  ];
}

function sharedPrompts(a, b) {
  const byPrompt = (run) => Map.groupBy(run.rollouts.map((_, i) => i), (i) => run.prompts[run.rollouts[i].prompt]);
  const [ours, theirs] = [byPrompt(a), byPrompt(b)], shared = [...ours.keys()].filter((text) => theirs.has(text)).slice(0, 200);
  const mean = (run, rows) => rows.reduce((sum, i) => sum + run.rollouts[i].reward, 0) / rows.length;
  const last = (run, rows, k) => link({ run: k, view: "rollouts", rollout: rows.at(-1), code: null, step: null }, {}, words(run, run.rollouts[rows.at(-1)].tokens));
  if (!shared.length) return p("No prompt is on both pages.");
  return table(`Prompts on both pages (${shared.length})`, [
    { name: "prompt", wide: true, cell: (t) => texts(t.slice(-160)) },
    num("reward A", (t) => mean(a, ours.get(t)), (x) => fixed(x, 2)), num("reward B", (t) => mean(b, theirs.get(t)), (x) => fixed(x, 2)),
    { name: "last of A", wide: true, cell: (t) => last(a, ours.get(t), 0) },
    { name: "last of B", wide: true, cell: (t) => last(b, theirs.get(t), 1) },
  ], shared, { sort: 1 });
}
