// Rollouts as they come in: searched, filtered, and a prompt's whole group side by side.

const LISTED = 25; // of an answer of the service
const FIELDS = [
  ["text", "in the response", { type: "search", maxlength: 400, placeholder: "text, or a pattern" }],
  ["prompt", "in the prompt", { type: "search", maxlength: 400, placeholder: "text, or an id" }],
  ["least", "reward from", { type: "number", step: "any" }],
  ["most", "reward to", { type: "number", step: "any" }],
  ["first", "policy version from", { type: "number", min: 0, step: 1 }],
  ["last", "policy version to", { type: "number", min: 0, step: 1 }],
];
const ENDS = ["", "stop", "length", "terminated", "turn_limit", "token_limit", "lost", "sampled", "greedy", "greedy_token"].map((v) => [v, v || "any"]);
const CHOICES = [
  ["success", "outcome", () => [["", "all"], ["good", "successes"], ["bad", "failures"]]],
  ["finish", "finish reason, or mode", () => ENDS],
  ["variant", "rollouts of", () => [["", "training"], ...news.state.variants.map((v) => [v, `evaluation, ${printable(v)}`])]],
];

// A search that says no more than `wanted`.
const searched = (wanted = {}) => ({ ...Object.fromEntries(SEARCH.map((name) => [name, null])), group: null, ...wanted });
const putField = (name) => (name === "regex" ? ($("s-regex").checked = chosen(name) === "1") : ($(`s-${name}`).value = chosen(name)));

function searchForm() {
  const known = [...FIELDS, ...CHOICES].map(([name]) => name);
  const form = el(
    "form",
    { class: "controls", role: "search", onsubmit: (event) => event.preventDefault() },
    FIELDS.map(([name, label, kind]) => el("label", {}, label, el("input", { id: `s-${name}`, autocomplete: "off", value: chosen(name), ...kind }))),
    CHOICES.map(([name, label, options]) => choose(label, options(), chosen(name), { id: `s-${name}` })),
    el("label", { class: "tick" }, el("input", { id: "s-regex", type: "checkbox", checked: chosen("regex") === "1" }), "regular expression"),
    el("button", { type: "button", onclick: () => go(searched()) }, "Reset"),
  );
  const values = () => Object.fromEntries([...known.map((name) => [name, $(`s-${name}`).value]), ["regex", $("s-regex").checked ? "1" : ""]]);
  let waiting;
  form.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => go(searched(values())), 250);
  });
  return form;
}

// Of a run that is over, the model is loaded while the reader looks: a counterfactual then does not wait for it.
const warm = () => news.state.model && news.state.status === "finished" && ask(pageOf("steer/api/model")).catch(() => {});

// The view once; `refreshRollouts` fills it, and again as rollouts come in.
const rolloutsView = () => (warm(), [
  title("Rollouts"),
  searchForm(),
  news.state.variants.includes("improved") && p("Why did it fail? ", link({ ...searched({ variant: "improved", success: "bad" }), ...LEFT }, {}, "Held-out answers of the improved policy that failed"), ": why, beside each."),
  soft("The newest first. A token's colour is that of its code; the number below it, too. Group shows all rollouts of the prompt in that update."),
  el("section", { id: "why", "aria-label": "why", "aria-live": "polite" }),
  el("section", { id: "group", "aria-label": "group" }),
  el("p", { id: "found", class: "soft", role: "status" }),
  el("ol", { id: "rollouts", class: "rollouts" }),
  el("div", { id: "pager", class: "pager" }),
]);

async function refreshRollouts() {
  const mine = ++turn, wanted = new URLSearchParams(SEARCH.map((name) => [name, chosen(name)]).filter(([, value]) => value !== ""));
  let found = null;
  try {
    found = await ask(ofRun(`rollouts?${wanted}`));
    const group = chosen("group") ? await ask(ofRun(`group?id=${encodeURIComponent(chosen("group"))}`)) : [];
    if (mine !== turn || tab() !== "rollouts" || !$("rollouts")) return;
    trouble(null);
    showFound(found);
    showGroup(group);
    await showWhy(mine);
  } catch (error) {
    if (mine !== turn) return;
    trouble(error);
    if (!found && $("rollouts")) ["found", "rollouts", "pager"].forEach((name) => put(name));
  }
}

// Counterfactuals of one rollout, computed by the run's model; kept while it is open.
let explained = { id: "" };

async function showWhy(mine) {
  const id = chosen("why"), step = /^\d+$/.test(chosen("step")) ? Number(chosen("step")) : null, known = explained.id === id && explained.run === news.run;
  if (!known) $("why").dataset.shown = "";
  if (!id) return put("why");
  if (!known) {
    put("why", soft("Computing counterfactuals\u2026 the model is loaded first."));
    explained = { id, run: news.run, data: await ask(ofRun("explain"), { rollout: id }) };
  }
  if (mine !== turn || !$("why") || $("why").dataset.shown === `${id} ${step}`) return; // rollouts come in, and what is read here stays
  const { data } = explained, key = document.activeElement?.dataset.key;
  $("why").dataset.shown = `${id} ${step}`;
  put("why",
    el("h3", {}, `Why this answer: ${printable(id)}`),
    soft(data.summary.expected && ["What the task knows of this prompt: ", texts(data.summary.expected), " "], link({ why: null, step: null }, {}, "Close")),
    data.note && note(data.note),
    rolloutDetail({ data, rollout: 0, step }),
  );
  [...$("why").querySelectorAll("[data-key]")].find((node) => node.dataset.key === key)?.focus({ preventScroll: true });
}

function showFound({ total, searched, kept, stored, rows }) {
  const at = Number(chosen("at")) || 0;
  const limits = (stored > kept ? ` The newest ${kept} of ${stored} are searched.` : "") + (searched < total ? " The pattern took too long: older rollouts were not searched." : "");
  put("found", total && !rows.length ? `${total} rollouts, none of them from ${at + 1} on.` : total ? `${total} rollouts, ${at + 1} to ${Math.min(total, at + LISTED)} shown.${limits}` : `No rollouts yet that fit.${limits}`);
  put("rollouts", rows.map((row) => el("li", { class: row.group_id === chosen("group") && "chosen" }, rolloutLine(row))));
  put("pager", at > 0 && link({ at: Math.max(0, at - LISTED) || null }, {}, "Newer"), at + LISTED < total && link({ at: at + LISTED }, {}, "Older"));
}

const verdict = (row) => [
  verdictOf(row.success, `${row.success ? "success" : "failure"}, reward ${fixed(row.reward, 2)}`),
  row.failure && verdictOf(false, ` verifier failed: ${printable(row.failure)}`),
];
const partsOf = (row) => Object.entries(row.reward_parts).map(([name, value]) => `${printable(name)} ${fixed(value, 2)}`).join(", ");
const whose = (row) => (row.variant ? printable(row.variant) : `policy version ${row.policy_version}`);

const rolloutLine = (row) => [
  verdict(row),
  el("span", { class: "soft" }, `, ${whose(row)}, ${printable(row.finish_reason)}; ${partsOf(row)} `),
  link({ group: row.group_id }, { "aria-label": `group of ${printable(row.prompt_id)}` }, "group"),
  " ",
  (row.variant ?? "improved") === "improved" && link({ why: row.rollout_id, step: null }, { "aria-label": `why ${printable(row.rollout_id)}` }, "why"),
  el("div", { class: "text soft" }, printable(row.prompt_text)),
  tokensOf(row),
];

// Tokens in the colours of their codes; the plain response where the tokenizer is not at hand.
function tokensOf(row) {
  if (!row.pieces) return el("div", { class: "text" }, printable(row.text), el("small", { class: "soft" }, ` ${row.actions.length ? "codes" : ""} ${row.actions.slice(0, 64).join(" ")}`));
  const latent = row.level === "latent", seen = (i) => row.generated.length && !row.generated[i];
  return el("div", { class: "tokens" }, row.pieces.slice(0, 400).map((piece, i) => (seen(i) ? texts(piece, "seen") : tokenOf(piece, latent ? row.actions[i] : null))));
}

function showGroup(rows) {
  if (!rows.length) return put("group");
  const ordered = [...rows].sort((a, b) => (b.advantage ?? -Infinity) - (a.advantage ?? -Infinity));
  const card = (row) =>
    el("div", { class: "panel" },
      p(el("strong", {}, row.advantage === null ? whose(row) : `advantage ${signed(row.advantage, 3)}`), ", ", verdict(row)),
      tokensOf(row),
      soft(`${printable(row.finish_reason)}; ${partsOf(row)}`));
  put("group",
    el("h3", { tabindex: "-1" }, `Group of ${printable(rows[0].prompt_id)}${rows[0].variant ? "" : `, ${whose(rows[0])}`}`),
    el("p", { class: "text" }, printable(rows[0].prompt_text)),
    soft("Advantage: reward \u2212 mean reward of the group. ", link({ group: null }, {}, "Close the group")),
    el("div", { class: "cards" }, ordered.map(card)));
}
