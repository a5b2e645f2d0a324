// What latent-control watch answers while it runs: counterfactuals of any rollout, where codes fire in a typed text, what banning or
// forcing a code changes, notes.

// A button that asks, and a place for the answer: `asked()` is the question's name and body, `shown(answer)` its nodes.
function asking(label, asked, shown) {
  const out = el("div", { role: "status" });
  const button = el("button", { type: "button", class: "plain", onclick: press }, label);
  async function press() {
    button.disabled = true;
    out.replaceChildren(soft("Computing\u2026"));
    try {
      const [question, body] = asked();
      out.replaceChildren(...nodes(shown(await ask(ofRun(question), body))));
    } catch (error) {
      out.replaceChildren(note(printable(error.message)));
    }
    button.disabled = false;
  }
  return [button, out];
}

// Explained rollouts by id, each a dataset of its own.
const onDemand = {};
const whyButton = ({ id }) => asking("Compute counterfactuals", () => ["explain", { rollout: id }], (found) => ((onDemand[id] = found), render(), null));

let typed = "";

function firesPanel(code) {
  const field = el("textarea", { id: "typed", rows: 3, maxlength: 4000, spellcheck: "false", oninput: () => (typed = field.value) }, typed);
  const of = ([t], k) => t.codes.find((c) => c.code === k);
  const shown = ({ tokens }) => {
    const rows = tokens.map((t, i) => [t, i]).filter(([t]) => t.codes.length);
    const own = code === null ? rows : rows.filter((row) => of(row, code)).sort((a, b) => of(b, code).chance - of(a, code).chance);
    return [
      el("div", { class: "tokens" }, tokens.map(({ text, codes: [top] }) => {
        const mark = top && (code === null || top.code === code);
        return el("span", { class: mark ? "token" : "text seen", "--hue": mark && hue(top.code) }, `${printable(text)} `, top && el("small", {}, top.code));
      })),
      code !== null && !own.length && p(`Code ${code} is among the five likeliest at no token.`),
      own.length > 0 &&
        table(code === null ? "The five likeliest codes at each token" : `Where code ${code} is among the five likeliest`, [
          num("place", ([, i]) => i, (x) => x),
          { name: "token", cell: ([t]) => texts(t.text) },
          ...(code === null ? [] : [num(`P(code ${code})`, (row) => of(row, code).chance, percent)]),
          { name: "codes: P(code), the token each would write", wide: true, cell: ([t]) => t.codes.map((c, j) => [j ? "; " : "", codeLink(c.code), ` ${percent(c.chance, 0)} `, texts(c.token)]) },
        ], own),
    ];
  };
  return el("section", { class: "panel", "aria-labelledby": "fires" },
    el("h3", { id: "fires" }, code === null ? "Where do codes fire in a text?" : `Where does code ${code} fire in a text?`),
    el("label", { class: "field" }, "a text: each token's codes are those of the policy after RL, given what stands before", field),
    asking("Show", () => ["fires", { text: typed }], shown));
}

function ablationPanel(k) {
  const place = el("input", { id: "place", type: "number", min: 0, step: 1, value: 0 });
  const shown = (how) => ({ prompts, success, difference: d, used, answers_changed: changed, flips }) => [
    p(`${how} code ${k}: success ${fixed(success[0])} \u2192 ${fixed(success[1])} on ${prompts} held-out prompts, greedy by code: ${signed(d.mean)} ` +
      `(95 % interval ${spanOf(d)}). The policy used it in ${used} of these answers; ${changed} came out otherwise.`),
    flips.length > 0 &&
      table("Prompts whose success changed", [
        { name: "prompt", wide: true, cell: (f) => texts(f.prompt.slice(-160)) },
        { name: "as it is", wide: true, cell: (f) => verdictOf(!f.better, printable(f.free)) },
        { name: how.toLowerCase(), wide: true, cell: (f) => verdictOf(f.better, printable(f.changed)) },
      ], flips),
  ];
  return el("section", { class: "panel", "aria-labelledby": "ablation" },
    el("h3", { id: "ablation" }, "Ablation: what changes without it, or with it"),
    asking("Ban it", () => ["ablate", { code: k, how: "ban" }], shown("Banned")),
    el("div", { class: "controls" }, el("label", {}, "at token", place)),
    asking("Force it", () => ["ablate", { code: k, how: "force", place: Number(place.value) }], shown("Forced")));
}

// Kept in the run folder, by what they are about.
let notesOf = null;

function notePanel(about) {
  const field = el("textarea", { id: "note", rows: 2, maxlength: 2000 }), show = () => (field.value = notesOf[about] ?? "");
  if (notesOf) show();
  else ask(ofRun("notes")).then((found) => ((notesOf = found), show()), () => (field.placeholder = "notes cannot be read"));
  return el("section", { class: "panel" },
    el("label", { class: "field" }, `note on ${printable(about)}, kept in the run folder`, field),
    asking("Keep", () => ["note", { about, text: field.value }], (found) => ((notesOf = found), p("Kept."))));
}
