// One token opened: what every code would write there.

const FEW = 12;

async function open(place) {
  now.open = place;
  now.options = null;
  showAnswer();
  if (place === null) {
    $("candidates").replaceChildren();
    focusToken(now.left);
    return;
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

function focusToken(place) {
  const button = document.querySelector(`#steered [data-place="${place}"]`);
  if (button) button.focus({ preventScroll: true });
}

const act = (name, label, change, disabled = false) =>
  el("button", { type: "button", class: "plain", disabled, onclick: change }, name, " ", unseen(label));

function use(place, code) {
  regenerateFrom(place, code);
  showForced();
  generate(place);
}

function forbidHere(place, code) {
  regenerateFrom(place);
  now.forbiddenAt.set(place, [...(now.forbiddenAt.get(place) || []), code]);
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

function letPolicy(place) {
  regenerateFrom(place);
  now.forbiddenAt.delete(place);
  showForced();
  generate(place);
}

function showCandidates() {
  const { place, chosen, codes, tokens } = now.options;
  const here = now.answer.tokens[place];
  const most = Math.max(...codes.map((row) => row.chance), 1e-9);
  const at = (row) => (row.token === here.id ? el("strong", {}, el("span", { class: "text" }, printable(row.text))) : el("span", { class: "text" }, printable(row.text)));
  const few = codes.filter((row, i) => i < FEW || row.code === chosen);
  const listed = now.every ? codes : few;
  $("candidates").replaceChildren(
    el(
      "section",
      { class: "panel", "aria-labelledby": "open-head" },
      el("h3", { id: "open-head" }, "Token ", place, ": ", el("span", { class: "text" }, printable(here.text)), ", by code ", codeMark(chosen)),
      el(
        "p",
        { class: "actions" },
        el("button", { type: "button", onclick: () => letPolicy(place) }, "Let the policy choose from here"),
        " ",
        el("button", { type: "button", onclick: () => open(null) }, "Close"),
      ),
      el(
        "div",
        { class: "pair" },
        table(
          "Tokens that codes lead to here, and the probability of each",
          [
            { name: "token", cell: at },
            { name: "probability", number: true, cell: (row) => chanceOf(row.chance), value: (row) => row.chance },
            { name: "", cell: (row) => bar(row.chance, 1) },
            { name: "codes", number: true, cell: (row) => row.codes, value: (row) => row.codes },
            {
              name: "",
              cell: (row) =>
                act("Write it", `${printable(row.text).trim()} at token ${place}, by code ${row.best}`, () => use(place, row.best)),
            },
          ],
          tokens,
        ),
        el("div", { class: "codes" }, table(
          "Codes by P(code), and the top token of each here",
          [
            { name: "code", cell: (row) => codeMark(row.code), value: (row) => -row.code },
            { name: "probability", number: true, cell: (row) => chanceOf(row.chance), value: (row) => row.chance },
            { name: "", cell: (row) => bar(row.chance, most, hue(row.code)) },
            { name: "top tokens", cell: at, value: (row) => row.text },
            { name: "P(token | code)", number: true, cell: (row) => percent(row.certainty, 0), value: (row) => row.certainty },
            {
              name: "",
              cell: (row) => [
                act("Use", `code ${row.code} at token ${place}`, () => use(place, row.code)),
                " ",
                act("Ban here", `forbid code ${row.code} at token ${place}`, () => forbidHere(place, row.code), !row.allowed),
                " ",
                act("Ban everywhere", `forbid code ${row.code} in the whole answer`, () => forbidEverywhere(row.code), !row.allowed),
              ],
            },
          ],
          listed,
          { chosen: (row) => row.code === chosen },
        ),
        few.length < codes.length &&
          el("p", {}, el("button", { type: "button", class: "plain", id: "every", onclick: showEvery }, now.every ? "Only the likeliest" : `All ${codes.length} codes`))),
      ),
    ),
  );
}

function showEvery() {
  now.every = !now.every;
  showCandidates();
  $("every").focus({ preventScroll: true });
}
