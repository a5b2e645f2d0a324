// What was asked last, and what came back. `codes` forces: those before a token that was regenerated from, as they were (kept), and
// the reader's own (pins).
const now = { model: null, codes: [], pins: new Set(), forbiddenAt: new Map(), answer: null, free: null, base: null, open: null, options: null, every: false, turn: 0 };

// "3,5,10-15" as numbers; with `gaps`, "_" is a code left to the policy.
function numbers(text, name, gaps) {
  const found = [];
  for (const part of text.split(/[\s,]+/).filter(Boolean)) {
    const range = /^(\d{1,6})-(\d{1,6})$/.exec(part);
    if (gaps && part === "_") found.push(null);
    else if (/^\d{1,6}$/.test(part)) found.push(Number(part));
    else if (range && !gaps && Number(range[1]) <= Number(range[2]) && Number(range[2]) < now.model.num_codes) for (let code = Number(range[1]); code <= Number(range[2]); code++) found.push(code);
    else throw new Error(`${name}: ${part} is not a code; the codes are 0 to ${now.model.num_codes - 1}`);
  }
  return found;
}

const whole = (id, name) => {
  const value = $(id).value ? Number($(id).value) : NaN;
  if (!Number.isInteger(value) || value < 0) throw new Error(`${name}: ${$(id).value || "nothing"} is not a whole number`);
  return value;
};

// The wish without what steers it: prompt, length and sampling.
function plainWish() {
  const sampled = $("mode").value === "sampled";
  return { prompt: $("prompt").value, max_tokens: whole("max", "max new tokens"), temperature: sampled ? Number($("temperature").value) : 0, seed: sampled ? whole("seed", "seed") : 0 };
}

function wish() {
  const allowed = $("allowed").value.trim();
  return {
    ...plainWish(),
    codes: now.codes,
    allowed_codes: allowed ? numbers(allowed, "only these codes") : null,
    forbidden_codes: numbers($("forbidden").value, "forbid codes"),
    forbidden_at: Object.fromEntries([...now.forbiddenAt].filter(([, codes]) => codes.length)),
  };
}

const isSteered = (asked) => asked.codes.some((code) => code !== null) || asked.allowed_codes !== null || asked.forbidden_codes.length > 0 || Object.keys(asked.forbidden_at).length > 0;

// Drops what was decided at token `place` and after it; `code`, if given, is forced there. What is before stays as it stands.
function regenerateFrom(place, code) {
  now.codes = now.answer.tokens.slice(0, place).map((token) => token.code);
  now.pins = new Set([...now.pins].filter((at) => at < place));
  if (code !== undefined) {
    now.codes.push(code);
    now.pins.add(place);
  }
  for (const at of [...now.forbiddenAt.keys()]) if (at > place || (at === place && code !== undefined)) now.forbiddenAt.delete(at);
}

const pinned = (free) => Array.from({ length: Math.max(-1, ...now.pins) + 1 }, (_, at) => (now.pins.has(at) ? now.codes[at] : free));
// Only the reader's own codes stay: for another prompt, or other rules, what was kept may no longer hold.
const keepPins = () => (now.codes = pinned(null));
// The field says what is pinned.
const showForced = () => ($("forced").value = pinned("_").join(","));

function readForced() {
  now.codes = numbers($("forced").value, "force from the start", true);
  now.pins = new Set(now.codes.flatMap((code, at) => (code === null ? [] : [at])));
}
