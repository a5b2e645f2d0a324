// The steered answer, token by token, and the answers beside it.

const chanceOf = (chance) => (chance >= 0.9995 ? "100 %" : chance < 0.001 ? "<0.1 %" : percent(chance, chance < 0.0995 ? 1 : 0));
const chip = (text, label, undo) => el("li", { class: "chip" }, text, el("button", { type: "button", "aria-label": label, onclick: undo }, "\u00d7"));
const spanStart = (place) => place - (place % now.model.span);
const unseen = (text) => el("span", { class: "unseen" }, text);
const codeMark = (code) => el("span", { class: "code", "--hue": hue(code) }, code);
const isChanged = (place) => now.free.tokens[place]?.id !== now.answer.tokens[place].id;

function verdict(answer) {
  const found = answer.verdict;
  if (!found) return now.model.task ? "not one of the task\u2019s prompts: not scored" : "not scored";
  if (found.reward === null) return `the verifier could not judge: ${printable(found.problem)}`;
  return verdictOf(found.success, `reward ${fixed(found.reward, 2)}, ${found.success ? "success" : "no success"}`);
}
const ending = (answer) => `${answer.tokens.length} token${answer.tokens.length === 1 ? "" : "s"}, ${answer.finish_reason === "stop" ? "stopped (EOS)" : "cut at the limit"}`;
const reply = (answer, none) => [
  el("p", { class: "reply text" }, answer.text ? printable(answer.text) : none),
  p(verdict(answer), el("span", { class: "soft" }, ` \u00b7 ${ending(answer)}`)),
];

function tokenButton(token, place) {
  const inside = place % now.model.span !== 0, own = now.pins.has(spanStart(place)), changed = now.free && isChanged(place);
  const barred = (now.forbiddenAt.get(place) || []).length, marks = `${own && !inside ? "\u25c6" : ""}${barred ? "\u2298" : ""}`;
  const hints = [own && "forced by you", barred && "with codes forbidden here", changed && "changed by steering"].filter(Boolean);
  return el(
    "button",
    {
      type: "button", class: `token${own ? " pinned" : ""}${changed ? " changed" : ""}`, "--hue": hue(token.code), "data-place": place, disabled: inside,
      "aria-pressed": String(now.open === place), "aria-controls": "candidates", onclick: () => open(now.open === place ? null : place),
    },
    unseen(`token ${place}: `),
    printable(token.text),
    el("small", {}, unseen(" code "), token.code, marks && el("span", { "aria-hidden": "true" }, marks)),
    el("small", {}, unseen(", probability "), token.chance === null ? "\u00b7" : chanceOf(token.chance)),
    hints.length > 0 && unseen(`, ${hints.join(", ")}`),
  );
}

function decisions() {
  const undo = (change) => () => {
    change();
    keepPins();
    showForced();
    generate();
  };
  const pin = (place) => chip([`token ${place}: code `, codeMark(now.codes[place])], `no longer force code ${now.codes[place]} at token ${place}`, undo(() => now.pins.delete(place)));
  const allow = (place, code) => undo(() => now.forbiddenAt.set(place, now.forbiddenAt.get(place).filter((other) => other !== code)));
  const bar = (place, code) => chip([`token ${place}: not code `, codeMark(code)], `allow code ${code} at token ${place} again`, allow(place, code));
  return [...[...now.pins].sort((a, b) => a - b).map(pin), ...[...now.forbiddenAt].flatMap(([place, codes]) => codes.map((code) => bar(place, code)))];
}

function showAnswer() {
  const { answer } = now, list = decisions();
  put("steered",
    reply(answer, "(nothing: the first token was the end)"),
    soft("Each token, the code that wrote it and P(code) under the policy. Click one to see every code\u2019s top token there and to go on from it."),
    el("div", { class: "tokens", role: "group", "aria-label": "tokens of the steered answer" }, answer.tokens.map(tokenButton)),
    list.length > 0 && el("ul", { class: "chips", "aria-label": "what you decided" }, list));
}

function card(name, answer, hint) {
  const coded = answer?.tokens.some((token) => token.code !== null);
  const shown = () => [reply(answer, "(nothing)"), el("div", { class: `tokens${coded ? "" : " plainwords"}` }, answer.tokens.map((token) => tokenOf(token.text, token.code)))];
  return el("article", { class: "panel" }, el("h3", {}, name), soft(hint), answer ? shown() : soft("\u2026"));
}

const showBeside = () =>
  put("beside", card("Steered", now.answer, "with what you decided"), card("Policy alone", now.free, "nothing decided for it"), card("Base LM", now.base, "its own tokens, no codes"));
