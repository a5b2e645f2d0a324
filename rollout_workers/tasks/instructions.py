"""Instructions that a program can check, in the manner of IFEval (Zhou et al., 2023): a short text about a topic, of a
given length, form or choice of words.

Held-out prompts have topics that training never sees, and half of them at least one kind of instruction that it never
sees; ``metadata["kinds"]`` says which: ``seen`` or ``unseen``.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rollout_workers.tasks.protocol import Demonstration, LazySequence, Prompt, Score, Split, require_split, split_of

LENGTHS: Mapping[str, int] = {"train": 1_000_000, "heldout": 10_000}
HELDOUT_SHARE = 0.2
_LONGEST_RESPONSE = 4000
_LEAST_WORDS = 4
"""A text of fewer words is none, whatever else it obeys."""

_SUBJECTS = (
    "apples bees books bread bridges candles castles cats chess clocks clouds coffee cooking dogs dolphins dreams "
    "eagles farming fire fishing flowers forests friendship frogs gardens glass gold horses ice islands kites lakes "
    "languages lemons libraries lions maps markets mirrors money monkeys mountains music oceans owls painting paper "
    "parks penguins pianos pirates planets poems rain rivers robots roses salt schools ships shoes silence sleep snow "
    "soccer spiders sport stars storms sugar sunlight swimming tea tigers time towers trains travel trees volcanoes "
    "walking water whales wheels wind windows winter wolves"
)
_KEYWORDS = "always bright cold every green home people small sometimes together under young"
TOPICS, KEYWORDS = tuple(_SUBJECTS.split()), tuple(_KEYWORDS.split())
LETTERS = "bcdfgkmpvw"


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z0-9']+", text)


def _sentences(text: str) -> int:
    return len([part for part in re.split(r"[.!?]+(?:\s|$)", text) if _words(part)])


def _bullets(text: str) -> int:
    return sum(line.lstrip().startswith(("- ", "* ")) for line in text.splitlines())


def _object(text: str) -> dict[str, object]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


Check = Callable[[str], bool]
Kind = Callable[[random.Random], tuple[str, object]]
"""Draws an instruction: its text and what ``CHECKS`` needs to check it."""
SEEN: Mapping[str, Kind] = {
    "at_most": lambda rng: (f"Use at most {(n := rng.choice((10, 15, 20, 25)))} words.", n),
    "at_least": lambda rng: (f"Use at least {(n := rng.choice((20, 25, 30)))} words.", n),
    "sentences": lambda rng: ("Write exactly {} sentence{}.".format(n := rng.randint(1, 3), "s" * (n > 1)), n),
    "include": lambda rng: (f'Include the word "{(word := rng.choice(KEYWORDS))}".', word),
    "without_letter": lambda rng: (f'Do not use the letter "{(letter := rng.choice(LETTERS))}".', letter),
    "lowercase": lambda rng: ("Write everything in lowercase letters.", None),
    "starts_with": lambda rng: (f'Start with the word "{(word := rng.choice(KEYWORDS).title())}".', word),
    "question": lambda rng: ("End with a question mark.", None),
    "json": lambda rng: (f'Answer with a JSON object that has the key "{(key := rng.choice(KEYWORDS))}".', key),
}
UNSEEN: Mapping[str, Kind] = {
    "uppercase": lambda rng: ("Write everything in capital letters.", None),
    "no_comma": lambda rng: ("Do not use any commas.", None),
    "ends_with": lambda rng: (f'Make "{(word := rng.choice(KEYWORDS))}" the last word.', word),
    "bullets": lambda rng: (f"Answer with exactly {(n := rng.randint(2, 4))} bullet points that begin with a dash.", n),
}
KINDS: Mapping[str, Kind] = {**SEEN, **UNSEEN}
CHECKS: Mapping[str, Callable[[str, object], bool]] = {
    "at_most": lambda text, n: len(_words(text)) <= n,  # type: ignore[operator]
    "at_least": lambda text, n: len(_words(text)) >= n,  # type: ignore[operator]
    "sentences": lambda text, n: _sentences(text) == n,
    "include": lambda text, word: word in _words(text.lower()),
    "without_letter": lambda text, letter: str(letter) not in text.lower(),
    "lowercase": lambda text, _: text == text.lower(),
    "starts_with": lambda text, word: _words(text)[:1] == [word],
    "question": lambda text, _: text.rstrip().endswith("?"),
    "json": lambda text, key: key in _object(text),
    "uppercase": lambda text, _: text == text.upper(),
    "no_comma": lambda text, _: "," not in text,
    "ends_with": lambda text, word: _words(text.lower())[-1:] == [word],
    "bullets": lambda text, n: _bullets(text) == n,
}
APART = (
    {"at_most", "at_least"},
    {"at_most", "bullets", "sentences"},
    {"lowercase", "uppercase", "starts_with"},
    {"question", "ends_with"},
    *({"without_letter", kind} for kind in ("include", "starts_with", "ends_with")),
)
"""Of each of these sets a prompt has at most one kind; ``ALONE`` go with no other."""
ALONE = {"json"}


@dataclass(frozen=True, kw_only=True, slots=True)
class InstructionsOptions:
    """``task.options`` of instructions."""

    count: int = 2
    """Instructions of a prompt, 1 to 3."""
    seed: int = 0
    """Another seed: other prompts in another order. Which topics are held out does not depend on it."""

    def __post_init__(self) -> None:
        for name, low, high in (("count", 1, 3), ("seed", 0, 2**63)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(
                    f"task.options.{name} of instructions is {value!r}; it must be a whole number from {low} to {high}"
                )


class Instructions:
    """The task; see the module's docstring."""

    name = "instructions"
    parts = ("success", "obeyed")

    def __init__(self, options: InstructionsOptions | None = None) -> None:
        self.options = options or InstructionsOptions()
        self.topics: Mapping[Split, tuple[str, ...]] = {
            split: tuple(topic for topic in TOPICS if split_of(topic, HELDOUT_SHARE) == split)
            for split in ("train", "heldout")
        }

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Prompts of the split, as a conversation's first message. Train and held-out share no topic."""
        require_split(split)
        return LazySequence(LENGTHS[split], lambda index: self._prompt(split, index))

    def demonstrations(self, split: Split) -> Sequence[Demonstration]:
        """There are none but what a base LM says: ``latent-control sample`` writes it, and a ``rows`` task reads it."""
        require_split(split)
        raise ValueError(
            "the task instructions has no texts of its own to learn codes from; write the base LM's with "
            "'latent-control sample CONFIG --out samples.jsonl' and name them in actions.data and clone.data "
            "(configs/instructions.yaml)"
        )

    def score(self, prompt: Prompt, text: str) -> Score:
        """Reward: the share of the instructions that are obeyed (part ``obeyed``); success: all are. A text of fewer
        than four words that is no JSON obeys none."""
        wanted: Mapping[str, object] = prompt.metadata["wanted"]  # type: ignore[assignment]
        text = text.strip()
        whole = len(text) <= _LONGEST_RESPONSE and (len(_words(text)) >= _LEAST_WORDS or "json" in wanted)
        obeyed = [whole and CHECKS[kind](text, value) for kind, value in wanted.items()]
        share = sum(obeyed) / len(obeyed)
        return Score(reward=share, success=all(obeyed), parts={"success": float(all(obeyed)), "obeyed": share})

    def _prompt(self, split: Split, index: int) -> Prompt:
        # Seeding with a text is by SHA-512: the same on every machine and Python version.
        rng = random.Random(f"instructions/{self.options.seed}/{split}/{index}")
        topic = rng.choice(self.topics[split])
        unseen = split == "heldout" and rng.random() < 0.5
        kinds = _draw(rng, self.options.count, unseen=unseen)
        drawn = {kind: KINDS[kind](rng) for kind in kinds}
        text = " ".join([f"Write a short text about {topic}.", *(said for said, _ in drawn.values())])
        return Prompt(
            id=f"{self.name}/{split}/{index}",
            text=text,
            metadata={
                "topic": topic,
                "kinds": "unseen" if unseen else "seen",
                "wanted": {kind: value for kind, (_, value) in drawn.items()},
            },
            turns=(("user", text),),
        )


def _draw(rng: random.Random, count: int, *, unseen: bool) -> list[str]:
    """Kinds that can be obeyed together; the first is one of ``UNSEEN`` where that is wanted."""
    chosen = [rng.choice(list(UNSEEN if unseen else SEEN))]
    others = list(KINDS if unseen else SEEN)
    rng.shuffle(others)
    for kind in others:
        fits = not any({kind, other} <= group for other in chosen for group in APART) and not ALONE & {kind, *chosen}
        if len(chosen) < count and kind not in chosen and fits:
            chosen.append(kind)
    return chosen
