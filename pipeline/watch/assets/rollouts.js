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
const CHOICES = [
  ["success", "outcome", [["", "all"], ["good", "successes"], ["bad", "failures"]]],
  ["finish", "finish reason, or mode", ["", "stop", "length", "terminated", "turn_limit", "token_limit", "lost", "sampled", "greedy", "greedy_token"].map((v) => [v, v || "any"])],
  ["variant", "rollouts of", []],
];

let turn = 0;

function searchForm() {
  const form = el(
    "form",
    { class: "controls", role: "search", onsubmit: (event) => event.preventDefault() },
    FIELDS.map(([name, label, kind]) => el("label", {}, label, el("input", { id: `s-${name}`, autocomplete: "off", value: chosen(name), ...kind }))),
    CHOICES.map(([name, label, known]) => [name, label, name === "variant" ? [["", "training"], ...news.state.variants.map((v) => [v, `evaluation, ${printable(v)}`])] : known]).map(([name, label, options]) =>
      el("label", {}, label, el("select", { id: `s-${name}` }, options.map(([v, text]) => el("option", { value: v, selected: v === chosen(name) }, text)))),
    ),
    el("label", { class: "tick" }, el("input", { id: "s-regex", type: "checkbox", checked: chosen("regex") === "1" }), "regular expression"),
    el("button", { type: "button", onclick: () => clear() }, "Reset"),
  );
  const values = () =>
    Object.fromEntries([...FIELDS, ...CHOICES].map(([name]) => [name, $(`s-${name}`).value]).concat([["regex", $("s-regex").checked ? "1" : ""]]));
  const clear = () => {
    form.reset();
    for (const [name] of [...FIELDS, ...CHOICES]) $(`s-${name}`).value = "";
    $("s-regex").checked = false;
    go({ ...values(), at: null, group: null });
  };
  let waiting;
  form.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => go({ ...values(), at: null, group: null }), 250);
  });
  return form;
}

// The view once; `refreshRollouts` fills it, and again as rollouts come in.
const rolloutsView = () => [
  el("h2", {}, "Rollouts"),
  searchForm(),
  el("p", { class: "soft" }, "The newest first. A token's colour is that of its code; the number below it, too. Group shows all rollouts of the prompt in that update."),
  el("section", { id: "why", "aria-label": "why", "aria-live": "polite" }),
  el("section", { id: "group", "aria-label": "group" }),
  el("p", { id: "found", class: "soft", role: "status" }),
  el("ol", { id: "rollouts", class: "rollouts" }),
  el("div", { id: "pager", class: "pager" }),
];

async function refreshRollouts() {
  const mine = ++turn;
  const wanted = new URLSearchParams(SEARCH.map((name) => [name, chosen(name)]).filter(([, value]) => value !== ""));
  try {
    const found = await ask(ofRun(`rollouts?${wanted}`));
    const group = chosen("group") ? await ask(ofRun(`group?id=${encodeURIComponent(chosen("group"))}`)) : [];
    if (mine !== turn || tab() !== "rollouts" || !$("rollouts")) return;
    trouble(null);
    showFound(found);
    showGroup(group);
    await showWhy(mine);
  } catch (error) {
    if (mine === turn) trouble(error);
  }
}

// Counterfactuals of one rollout, computed by the run's model; kept while it is open.
let explained = { id: "" };

async function showWhy(mine) {
  const id = chosen("why");
  if (!id) return ($("why").dataset.shown = ""), $("why").replaceChildren();
  if (explained.id !== id || explained.run !== news.run) {
    $("why").dataset.shown = "";
    $("why").replaceChildren(el("p", { class: "soft" }, "Computing counterfactuals\u2026 the model is loaded first."));
    const data = await ask(ofRun("explain"), { rollout: id });
    explained = { id, run: news.run, data };
  }
  if (mine !== turn || !$("why")) return;
  const { data } = explained;
  const step = /^\d+$/.test(chosen("step")) ? Number(chosen("step")) : null;
  if ($("why").dataset.shown === `${id} ${step}`) return; // rollouts come in, and what is read here stays
  const key = document.activeElement?.dataset.key;
  $("why").dataset.shown = `${id} ${step}`;
  $("why").replaceChildren(
    el("h3", {}, `Why this answer: ${printable(id)}`),
    el("p", { class: "soft" }, link({ why: null, step: null }, {}, "Close")),
    data.note && el("p", { class: "note" }, data.note),
    rolloutDetail({ data, rollout: 0, step }),
  );
  [...$("why").querySelectorAll("[data-key]")].find((node) => node.dataset.key === key)?.focus({ preventScroll: true });
}

function showFound({ total, searched, kept, stored, rows }) {
  const at = Number(chosen("at")) || 0;
  const limits = stored > kept ? ` The newest ${kept} of ${stored} are searched.` : "";
  const cut = searched < total ? " The pattern took too long: older rollouts were not searched." : "";
  $("found").textContent = total ? `${total} rollouts, ${at + 1} to ${Math.min(total, at + LISTED)} shown.${limits}${cut}` : `No rollouts yet that fit.${limits}${cut}`;
  $("rollouts").replaceChildren(...rows.map((row) => el("li", { class: row.group_id === chosen("group") && "chosen" }, rolloutLine(row))));
  $("pager").replaceChildren(
    ...[at > 0 && link({ at: Math.max(0, at - LISTED) || null }, {}, "Newer"), at + LISTED < total && link({ at: at + LISTED }, {}, "Older")].filter(Boolean),
  );
}

const verdict = (row) => [
  el("span", { class: row.success ? "good" : "bad" }, `${row.success ? "success" : "failure"}, reward ${fixed(row.reward, 2)}`),
  row.failure && el("span", { class: "bad" }, ` verifier failed: ${printable(row.failure)}`),
];
const partsOf = (row) => Object.entries(row.reward_parts).map(([name, value]) => `${printable(name)} ${fixed(value, 2)}`).join(", ");

const whose = (row) => (row.variant ? printable(row.variant) : `policy version ${row.policy_version}`);

function rolloutLine(row) {
  return [
    verdict(row),
    el("span", { class: "soft" }, `, ${whose(row)}, ${printable(row.finish_reason)}; ${partsOf(row)} `),
    link({ group: row.group_id }, { "aria-label": `group of ${printable(row.prompt_id)}` }, "group"),
    " ",
    (row.variant ?? "improved") === "improved" && link({ why: row.rollout_id, step: null }, { "aria-label": `why ${printable(row.rollout_id)}` }, "why"),
    el("div", { class: "text soft" }, printable(row.prompt_text)),
    tokensOf(row),
  ];
}

// Tokens in the colours of their codes; the plain response where the tokenizer is not at hand.
function tokensOf(row) {
  if (!row.pieces) return el("div", { class: "text" }, printable(row.text), el("small", { class: "soft" }, ` ${row.actions.length ? "codes" : ""} ${row.actions.slice(0, 64).join(" ")}`));
  const latent = row.level === "latent";
  return el(
    "div",
    { class: "tokens" },
    row.pieces.slice(0, 400).map((piece, i) =>
      row.generated.length && !row.generated[i]
        ? el("span", { class: "text seen" }, printable(piece))
        : el("span", { class: "token", "--hue": latent ? hue(row.actions[i]) : "var(--line)" }, `${printable(piece)} `, latent && el("small", {}, row.actions[i])),
    ),
  );
}

function showGroup(rows) {
  if (!rows.length) return $("group").replaceChildren();
  const ordered = [...rows].sort((a, b) => (b.advantage ?? -Infinity) - (a.advantage ?? -Infinity));
  $("group").replaceChildren(
    el("h3", { tabindex: "-1" }, `Group of ${printable(rows[0].prompt_id)}${rows[0].variant ? "" : `, ${whose(rows[0])}`}`),
    el("p", { class: "text" }, printable(rows[0].prompt_text)),
    el("p", { class: "soft" }, "Advantage: reward \u2212 mean reward of the group. ", link({ group: null }, {}, "Close the group")),
    el(
      "div",
      { class: "cards" },
      ordered.map((row) =>
        el(
          "div",
          { class: "panel" },
          el("p", {}, el("strong", {}, row.advantage === null ? whose(row) : `advantage ${signed(row.advantage, 3)}`), ", ", verdict(row)),
          tokensOf(row),
          el("p", { class: "soft" }, `${printable(row.finish_reason)}; ${partsOf(row)}`),
        ),
      ),
    ),
  );
}
