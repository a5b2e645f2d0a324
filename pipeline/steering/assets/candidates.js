// One token opened: what every code would write there.

const FEW = 12;

async function open(place) {
  Object.assign(now, { open: place, options: null });
  showAnswer();
  if (place === null) {
    put("candidates");
    return focusToken(now.left);
  }
  now.left = place;
  focusToken(place);
  const turn = now.turn;
  try {
    const found = await ask("api/candidates", { ...now.asked, place });
    if (turn !== now.turn || now.open !== place) return;
    now.options = found;
    showCandidates();
  } catch (error) {
    trouble(error);
  }
}

const focusToken = (place) => document.querySelector(`#steered [data-place="${place}"]`)?.focus({ preventScroll: true });
const act = (name, label, change, disabled = false) => el("button", { type: "button", class: "plain", disabled, onclick: change }, name, " ", unseen(label));

// `decide` from token `place` on: a code there, one forbidden there, or neither.
function from(place, { code, barred, freed }) {
  regenerateFrom(place, code);
  if (barred !== undefined) now.forbiddenAt.set(place, [...(now.forbiddenAt.get(place) || []), barred]);
  if (freed) now.forbiddenAt.delete(place);
  showForced();
  generate(place);
}

function forbidEverywhere(code) {
  const field = $("forbidden");
  field.value = field.value.trim() ? `${field.value.trim()},${code}` : String(code);
  for (const place of [...now.pins]) if (now.codes[place] === code) now.pins.delete(place);
  keepPins();
  showForced();
  generate();
}

function showCandidates() {
  const { place, chosen, codes, tokens } = now.options, here = now.answer.tokens[place];
  const most = Math.max(...codes.map((row) => row.chance), 1e-9), few = codes.filter((row, i) => i < FEW || row.code === chosen);
  const at = (row) => (row.token === here.id ? el("strong", {}, texts(row.text)) : texts(row.text));
  const chance = num("probability", (row) => row.chance, chanceOf), width = (scale, ink) => ({ name: "", cell: (row) => bar(row.chance, scale, ink && hue(row.code)) });
  const every = el("button", { type: "button", class: "plain", id: "every", onclick: showEvery }, now.every ? "Only the likeliest" : `All ${codes.length} codes`);
  const acts = (row) => [
    act("Use", `code ${row.code} at token ${place}`, () => from(place, { code: row.code })), " ",
    act("Ban here", `forbid code ${row.code} at token ${place}`, () => from(place, { barred: row.code }), !row.allowed), " ",
    act("Ban everywhere", `forbid code ${row.code} in the whole answer`, () => forbidEverywhere(row.code), !row.allowed),
  ];
  const write = (row) => act("Write it", `${printable(row.text).trim()} at token ${place}, by code ${row.best}`, () => from(place, { code: row.best }));
  put("candidates", el("section", { class: "panel", "aria-labelledby": "open-head" },
    el("h3", { id: "open-head" }, "Token ", place, ": ", texts(here.text), ", by code ", codeMark(chosen)),
    el("p", { class: "actions" },
      el("button", { type: "button", onclick: () => from(place, { freed: true }) }, "Let the policy choose from here"), " ",
      el("button", { type: "button", onclick: () => open(null) }, "Close")),
    el("div", { class: "pair" },
      table("Tokens that codes lead to here, and the probability of each", [{ name: "token", cell: at }, chance, width(1), num("codes", (row) => row.codes, (x) => x), { name: "", cell: write }], tokens),
      el("div", { class: "codes" },
        table("Codes by P(code), and the top token of each here", [
          { name: "code", cell: (row) => codeMark(row.code), value: (row) => -row.code }, chance, width(most, true),
          { name: "top tokens", cell: at, value: (row) => row.text }, num("P(token | code)", (row) => row.certainty, (x) => percent(x, 0)), { name: "", cell: acts },
        ], now.every ? codes : few, { chosen: (row) => row.code === chosen }),
        few.length < codes.length && p(every)))));
}

function showEvery() {
  now.every = !now.every;
  showCandidates();
  $("every").focus({ preventScroll: true });
}
