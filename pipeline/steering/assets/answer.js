// The steered answer, token by token, and the answers beside it.

const chanceOf = (chance) => (chance >= 0.9995 ? "100 %" : chance < 0.001 ? "<0.1 %" : percent(chance, chance < 0.0995 ? 1 : 0));
const chip = (text, label, undo) => el("li", { class: "chip" }, text, el("button", { type: "button", "aria-label": label, onclick: undo }, "\u00d7"));
const spanStart = (place) => place - (place % now.model.span);

function verdict(answer) {
  const found = answer.verdict;
  if (!found) return now.model.task ? "not one of the task\u2019s prompts: not scored" : "not scored";
  if (found.reward === null) return `the verifier could not judge: ${printable(found.problem)}`;
  const word = found.success ? "success" : "no success";
  return el("span", { class: found.success ? "good" : "bad" }, `reward ${fixed(found.reward, 2)}, ${word}`);
}

const ending = (answer) =>
  `${answer.tokens.length} token${answer.tokens.length === 1 ? "" : "s"}, ${answer.finish_reason === "stop" ? "stopped (EOS)" : "cut at the limit"}`;

function tokenButton(token, place) {
  const inside = place % now.model.span !== 0;
  const pinned = now.pins.has(spanStart(place));
  const changed = now.free && isChanged(place);
  const barred = (now.forbiddenAt.get(place) || []).length;
  const hints = [pinned && "forced by you", barred && "with codes forbidden here", changed && "changed by steering"].filter(Boolean);
  return el(
    "button",
    {
      type: "button",
      class: `token${pinned ? " pinned" : ""}${changed ? " changed" : ""}`,
      "--hue": hue(token.code),
      "aria-pressed": String(now.open === place),
      "aria-controls": "candidates",
      "data-place": place,
      disabled: inside,
      onclick: () => open(now.open === place ? null : place),
    },
    unseen(`token ${place}: `),
    printable(token.text),
    el("small", {}, unseen(" code "), token.code, marks(pinned && !inside, barred)),
    el("small", {}, unseen(", probability "), token.chance === null ? "\u00b7" : chanceOf(token.chance)),
    hints.length ? unseen(`, ${hints.join(", ")}`) : null,
  );
}

const unseen = (text) => el("span", { class: "unseen" }, text);
const marks = (pinned, barred) =>
  pinned || barred ? el("span", { "aria-hidden": "true" }, pinned ? "\u25c6" : "", barred ? "\u2298" : "") : null;

const isChanged = (place) => {
  const other = now.free.tokens[place];
  return !other || other.id !== now.answer.tokens[place].id;
};

function decisions() {
  const pins = [...now.pins].sort((a, b) => a - b);
  const undo = (change) => () => {
    change();
    keepPins();
    showForced();
    generate();
  };
  return [
    ...pins.map((place) =>
      chip(
        [`token ${place}: code `, codeMark(now.codes[place])],
        `no longer force code ${now.codes[place]} at token ${place}`,
        undo(() => now.pins.delete(place)),
      ),
    ),
    ...[...now.forbiddenAt].flatMap(([place, codes]) =>
      codes.map((code) =>
        chip(
          [`token ${place}: not code `, codeMark(code)],
          `allow code ${code} at token ${place} again`,
          undo(() => now.forbiddenAt.set(place, now.forbiddenAt.get(place).filter((other) => other !== code))),
        ),
      ),
    ),
  ];
}

const codeMark = (code) => el("span", { class: "code", "--hue": hue(code) }, code);

function showAnswer() {
  const { answer } = now,
    list = decisions();
  $("steered").replaceChildren(
    ...[
      el("p", { class: "reply text" }, answer.text ? printable(answer.text) : "(nothing: the first token was the end)"),
      el("p", {}, verdict(answer), el("span", { class: "soft" }, ` \u00b7 ${ending(answer)}`)),
      el(
        "p",
        { class: "soft" },
        "Each token, the code that wrote it and P(code) under the policy. Click one to see every code\u2019s top token there and to go on from it.",
      ),
      el("div", { class: "tokens", role: "group", "aria-label": "tokens of the steered answer" }, answer.tokens.map(tokenButton)),
      list.length ? el("ul", { class: "chips", "aria-label": "what you decided" }, list) : null,
    ].filter(Boolean),
  );
}

function card(name, answer, hint) {
  const shown = answer
    ? [
        el("p", { class: "reply text" }, answer.text ? printable(answer.text) : "(nothing)"),
        el("p", {}, verdict(answer), el("span", { class: "soft" }, ` \u00b7 ${ending(answer)}`)),
        el(
          "div",
          { class: `tokens${answer.tokens.some((token) => token.code !== null) ? "" : " plainwords"}` },
          answer.tokens.map((token) =>
            el(
              "span",
              { class: "token", "--hue": token.code === null ? "var(--line)" : hue(token.code) },
              printable(token.text),
              token.code === null ? null : el("small", {}, unseen(" code "), token.code),
            ),
          ),
        ),
      ]
    : el("p", { class: "soft" }, "\u2026");
  return el("article", { class: "card" }, el("h3", {}, name), el("p", { class: "soft" }, hint), shown);
}

function showBeside() {
  $("beside").replaceChildren(
    card("Steered", now.answer, "with what you decided"),
    card("Policy alone", now.free, "nothing decided for it"),
    card("Base LM", now.base, "its own tokens, no codes"),
  );
}
