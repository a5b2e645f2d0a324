// Two runs side by side.

function compareView() {
  const [a, b] = RUNS,
    same = a.summary.world === b.summary.world;
  const other = (k) => (same ? [k, 1] : a.similar[k]);
  const side = (name, run) =>
    el(
      "div",
      {},
      el("h3", {}, `${name}: ${printable(run.summary.run)}`),
      tiles([
        ["training reward, first and last 10 updates", `${fixed(run.summary.reward_first)} \u2192 ${fixed(run.summary.reward_last)}`],
        ["code perplexity of all training rollouts", fixed(run.summary.perplexity, 1)],
        ["active codes", run.codes.filter((c) => c.health === "active").length],
        ["gain along the path", run.summary.gain ? signed(run.summary.gain.mean) : "\u2013"],
        ...run.summary.evaluation.map(([variant, value]) => [`held-out success, ${variant}`, fixed(value)]),
      ]),
    );
  const both = (what, value) =>
    lines(
      what,
      [`first`, `last update`],
      [
        { name: `A ${printable(a.summary.run)}`, values: value(a) },
        { name: `B ${printable(b.summary.run)}`, values: value(b) },
      ],
    );
  const gain = (code) => (code.gain ? signed(code.gain.mean, 4) : "\u2013");
  return [
    title(`${printable(a.summary.run)} beside ${printable(b.summary.run)}`),
    el("div", { class: "columns" }, side("A", a), side("B", b)),
    el(
      "div",
      { class: "columns" },
      both("reward over training", (r) => r.training.reward),
      both("code perplexity over training", (r) => r.training.perplexity),
    ),
    el(
      "p",
      {},
      same
        ? "Both runs have one codebook: a code means the same in both."
        : "The runs have separate codebooks: each code of A is matched with the code of B with the most similar top tokens " +
            "(overlap of the tokens they produced in rollouts).",
    ),
    table(
      "Matched codes",
      [
        { name: "A", cell: (k) => codeLink(k, { run: 0 }), value: (k) => k },
        { name: "top tokens", cell: (k) => writes(a, a.codes[k]) },
        { name: "usage", number: true, cell: (k) => percent(a.codes[k].usage), value: (k) => a.codes[k].usage },
        { name: "gain", number: true, cell: (k) => gain(a.codes[k]), value: (k) => (a.codes[k].gain || {}).mean },
        { name: "B", cell: (k) => codeLink(other(k)[0], { run: 1 }), value: (k) => other(k)[0] },
        { name: "overlap", number: true, cell: (k) => percent(other(k)[1], 0), value: (k) => other(k)[1] },
        { name: "top tokens", cell: (k) => writes(b, b.codes[other(k)[0]]) },
        { name: "usage", number: true, cell: (k) => percent(b.codes[other(k)[0]].usage), value: (k) => b.codes[other(k)[0]].usage },
        { name: "gain", number: true, cell: (k) => gain(b.codes[other(k)[0]]), value: (k) => (b.codes[other(k)[0]].gain || {}).mean },
      ],
      a.codes.map((_, k) => k),
      { sort: 2 },
    ),
    sharedPrompts(a, b),
  ];
}

function sharedPrompts(a, b) {
  const byPrompt = (run) => {
    const found = new Map();
    run.rollouts.forEach((r, i) => {
      const text = run.prompts[r.prompt];
      found.set(text, [...(found.get(text) || []), i]);
    });
    return found;
  };
  const [ours, theirs] = [byPrompt(a), byPrompt(b)],
    shared = [...ours.keys()].filter((text) => theirs.has(text)).slice(0, 200);
  const mean = (run, rows) => rows.reduce((sum, i) => sum + run.rollouts[i].reward, 0) / rows.length;
  const last = (run, rows, k) =>
    link(
      { run: k, view: "rollouts", rollout: rows[rows.length - 1], code: null, step: null },
      {},
      words(run, run.rollouts[rows[rows.length - 1]].tokens),
    );
  if (!shared.length) return el("p", {}, "No prompt is on both pages.");
  return table(
    `Prompts on both pages (${shared.length})`,
    [
      { name: "prompt", wide: true, cell: (t) => el("span", { class: "text" }, printable(t.slice(-160))) },
      { name: "reward A", number: true, cell: (t) => fixed(mean(a, ours.get(t)), 2), value: (t) => mean(a, ours.get(t)) },
      { name: "reward B", number: true, cell: (t) => fixed(mean(b, theirs.get(t)), 2), value: (t) => mean(b, theirs.get(t)) },
      { name: "last of A", wide: true, cell: (t) => last(a, ours.get(t), 0) },
      { name: "last of B", wide: true, cell: (t) => last(b, theirs.get(t), 1) },
    ],
    shared,
    { sort: 1 },
  );
}
