// Asking and showing.

// Asks for the steered answer and what stands beside it; `place` stays open if the answer is that long.
async function generate(place = null) {
  const turn = ++now.turn;
  let asked, plain;
  try {
    asked = wish();
    plain = plainWish();
  } catch (error) {
    return trouble(error);
  }
  const busy = (on) => (["steered", "beside"].forEach((id) => $(id).classList.toggle("busy", on)), $("answer").setAttribute("aria-busy", String(on)));
  busy(true);
  try {
    const answer = await ask("api/answer", asked);
    if (turn !== now.turn) return;
    trouble(null);
    Object.assign(now, { answer, asked });
    if (JSON.stringify(plain) !== now.plain) Object.assign(now, { plain: JSON.stringify(plain), free: null, base: null });
    now.free = isSteered(asked) ? now.free : answer;
    now.open = null;
    put("candidates");
    showAnswer();
    showBeside();
    $("status").textContent = `Answer: ${printable(answer.text)}`;
    if (place !== null) open(Math.min(place, spanStart(answer.tokens.length - 1)));
    for (const [name, path] of [["free", "api/answer"], ["base", "api/base"]]) {
      if (now[name]) continue;
      const found = await ask(path, plain);
      if (turn !== now.turn) return;
      now[name] = found;
    }
    showBeside();
    markChanges();
  } catch (error) {
    if (turn === now.turn) trouble(error);
  } finally {
    if (turn === now.turn) busy(false);
  }
}

// The answer again, now that what the policy writes alone is known; the focus stays.
function markChanges() {
  const focused = document.activeElement?.dataset.place;
  showAnswer();
  if (focused !== undefined) focusToken(focused);
}

function clearSteering() {
  for (const id of ["allowed", "forbidden", "forced"]) $(id).value = "";
  Object.assign(now, { codes: [], pins: new Set(), forbiddenAt: new Map() });
}

const sampling = () => ["temperature-field", "seed-field"].forEach((id) => ($(id).hidden = $("mode").value !== "sampled"));

async function start() {
  now.model = await ask("api/model");
  const { name, num_codes: count, span, task, note, prompts } = now.model;
  document.title = `${printable(name)}: steering`;
  $("title").textContent = `Steering: ${printable(name)}`;
  const run = location.pathname.match(/\/runs\/([^/]+)\/steer\/$/)?.[1]; // beside its other pages, by watch
  if (run) $("title").before(el("nav", {}, el("a", { href: `../../../#run=${run}` }, "\u2190 Watch")));
  const lasting = span > 1 ? `, each for ${span} tokens` : "";
  $("about").textContent = `${count} codes${lasting}${task ? `, task ${task}` : ""}${note ? `. ${printable(note)}` : ""}`;
  $("max").value = now.model.max_tokens;
  $("max").max = now.model.most_tokens;
  $("prompt").maxLength = now.model.most_characters;
  $("temperature").value = now.model.temperature;
  sampling();
  $("pick-field").hidden = !prompts.length;
  const end = (text) => printable(text.length > 90 ? "\u2026" + text.slice(-90) : text);
  $("pick").append(el("option", { value: "" }, "(your own)"), ...prompts.map((text, i) => el("option", { value: i }, `${i}: ${end(text)}`)));
  if (!prompts.length) return;
  $("pick").value = "0";
  $("prompt").value = prompts[0];
  await generate();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  try {
    readForced();
  } catch (error) {
    return trouble(error);
  }
  generate();
});
$("pick").addEventListener("change", () => {
  if ($("pick").value === "") return;
  $("prompt").value = now.model.prompts[Number($("pick").value)];
  clearSteering();
  generate();
});
$("prompt").addEventListener("input", () => {
  const at = now.model.prompts.indexOf($("prompt").value);
  $("pick").value = at < 0 ? "" : String(at);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
$("clear").addEventListener("click", () => {
  clearSteering();
  generate();
});
$("mode").addEventListener("change", sampling);
$("skip").href = "#answer";
DARK.addEventListener("change", () => {
  if (!now.answer) return;
  showAnswer();
  showBeside();
  if (now.options) showCandidates();
});
start().catch(trouble);
