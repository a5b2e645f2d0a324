"""Countdown: reach a target from a few numbers with + - * /, each number used exactly once.

The prompt ``3 7 25 -> 29 :`` has the response ``25 - 3 = 22 , 22 + 7 = 29``. Every number that occurs lies in 0..149,
so a word-level vocabulary of the numbers and a few symbols covers the task.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rollout_workers.tasks.protocol import Demonstration, LazySequence, Prompt, Score, Split, require_split, split_of

MAX_VALUE = 149
"""Largest number that may occur anywhere."""
SYMBOLS = ("+", "-", "*", "/", "=", ",", "->", ":")
LENGTHS: Mapping[str, int] = {"train": 1_000_000, "heldout": 10_000}
HELDOUT_SHARE = 0.1
# ASCII digits only: str.isdigit() and \d accept other scripts, and int() accepts huge texts.
_STEP = re.compile(r"([0-9]{1,3}) ([-+*/]) ([0-9]{1,3}) = ([0-9]{1,3})")
_LONGEST_RESPONSE = 400
_WANTED = "+-*/0123456789"

Step = tuple[int, str, int, int]
"""``(25, "-", 3, 22)`` is ``25 - 3 = 22``."""


def apply(a: int, op: str, b: int) -> int | None:
    """``a op b`` in exact integer arithmetic; ``None`` where it is no integer or leaves 0..149."""
    if op == "/":
        return a // b if b and a % b == 0 else None
    value = {"+": a + b, "-": a - b, "*": a * b}[op]
    return value if 0 <= value <= MAX_VALUE else None


def check_steps(text: str, numbers: Sequence[int]) -> list[int] | None:
    """What is left of ``numbers`` after the steps of ``text``; ``None`` as soon as one of them is not valid.

    Each step takes two available numbers and puts its (correct) result in their place.
    """
    if len(text) > _LONGEST_RESPONSE:
        return None
    left = list(numbers)
    for part in " ".join(text.split()).split(" , "):
        match = _STEP.fullmatch(part)
        if match is None:
            return None
        a, b, result = int(match[1]), int(match[3]), int(match[4])
        if apply(a, match[2], b) != result:
            return None
        for operand in (a, b):
            if operand not in left:
                return None
            left.remove(operand)
        left.append(result)
    return left


def _random_steps(rng: random.Random, numbers: Sequence[int]) -> list[Step]:
    """Random valid steps that use up ``numbers``; the larger operand comes first."""
    left, steps = list(numbers), []
    while len(left) > 1:
        first, second = rng.sample(range(len(left)), 2)
        a, b = max(left[first], left[second]), min(left[first], left[second])
        op = rng.choice([op for op in "+-*/" if apply(a, op, b) is not None] or ["-"])
        result = apply(a, op, b)
        assert result is not None, (a, op, b)  # a - b is always possible: a >= b
        left = [x for i, x in enumerate(left) if i not in (first, second)] + [result]
        steps.append((a, op, b, result))
    return steps


def _added_up(numbers: Sequence[int]) -> list[Step]:
    """Steps that add ``numbers`` up from left to right, and take away where a sum would leave 0..149."""
    steps, total = [], numbers[0]
    for number in numbers[1:]:
        op = "+" if apply(total, "+", number) is not None else "-"
        a, b = (total, number) if op == "+" else (max(total, number), min(total, number))
        result = apply(a, op, b)
        assert result is not None, (a, op, b)
        steps.append((a, op, b, result))
        total = result
    return steps


def _render(steps: Sequence[Step]) -> str:
    return " , ".join(f"{a} {op} {b} = {result}" for a, op, b, result in steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class CountdownOptions:
    """``task.options`` of countdown."""

    numbers: int = 3
    """Numbers in a problem, 3 or 4."""
    largest: int = 25
    """Problems draw their numbers from 1 to this, at most 149."""
    skill: float = 0.35
    """Share of the demonstrations that solve their problem."""
    habit: float = 0.0
    """Share that adds the numbers up from left to right, whatever the target is. All others are random valid steps that
    miss the target."""
    seed: int = 0
    """Another seed: other problems in another order. Which problems are held out does not depend on it."""
    use: str = ""
    """Operators and digits, e.g. ``"+*"``, for the part ``use`` of a score: the share of them that valid steps have."""
    avoid: str = ""
    """The same for the part ``avoid``: 1 for valid steps that have none of them, else 0."""

    def __post_init__(self) -> None:
        for name in ("use", "avoid"):
            wanted = getattr(self, name)
            if not isinstance(wanted, str) or not set(wanted) <= set(_WANTED):
                raise ValueError(
                    f"task.options.{name} of countdown is {wanted!r}; it must be a text of operators and digits, e.g. "
                    "'+*' or '7'"
                )
        bounds = {"numbers": (3, 4), "largest": (5, MAX_VALUE), "skill": (0, 1), "habit": (0, 1), "seed": (0, 2**63)}
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            whole = name in ("numbers", "largest", "seed")
            if (
                isinstance(value, bool)
                or not isinstance(value, int if whole else (int, float))
                or not low <= value <= high
            ):
                kind = "a whole number" if whole else "a number"
                raise ValueError(
                    f"task.options.{name} of countdown is {value!r}; it must be {kind} from {low} to {high}"
                )
        if self.skill + self.habit > 1:
            most = f"at most {1 - self.skill:g} with skill {self.skill}"
            raise ValueError(f"task.options.habit of countdown is {self.habit}; it must be {most}")


class Countdown:
    """The task; see the module's docstring."""

    name = "countdown"
    words = (*map(str, range(MAX_VALUE + 1)), *SYMBOLS)
    """Every word of a prompt or response: the vocabulary of a base LM trained for this task."""

    def __init__(self, options: CountdownOptions | None = None) -> None:
        self.options = options or CountdownOptions()
        wanted = [name for name in ("use", "avoid") if getattr(self.options, name)]
        self.parts = ("success", "format", *wanted)

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Problems of the split. Train and held-out share no problem (multiset of numbers and target)."""
        require_split(split)
        return LazySequence(LENGTHS[split], lambda index: self._problem(split, index)[0])

    def demonstrations(self, split: Split) -> Sequence[Demonstration]:
        """A response to each prompt; ``CountdownOptions`` says how many of them solve it."""
        require_split(split)
        return LazySequence(LENGTHS[split], lambda index: self._demonstration(split, index))

    def score(self, prompt: Prompt, text: str) -> Score:
        """Reward 1 when the steps use every number and end at the target, else 0.

        The part ``format`` is 1 when every step is valid, wherever they end; it is logged and not rewarded, nor are
        ``use`` and ``avoid``, where the options ask for them.
        """
        numbers: tuple[int, ...] = prompt.metadata["numbers"]  # type: ignore[assignment]
        left = check_steps(text, numbers)
        success = left == [prompt.metadata["target"]]
        parts = {"success": float(success), "format": float(left is not None)} | self._wanted(text, left is not None)
        return Score(reward=float(success), success=success, parts=parts)

    def _wanted(self, text: str, valid: bool) -> dict[str, float]:
        """The parts ``use`` and ``avoid``."""
        use, avoid = set(self.options.use), set(self.options.avoid)
        found = {"use": len(use & set(text)) / len(use)} if use else {}
        found |= {"avoid": float(not avoid & set(text))} if avoid else {}
        return {name: value * valid for name, value in found.items()}

    def _rng(self, *key: object) -> random.Random:
        # Seeding with a text is by SHA-512: the same on every machine and Python version.
        return random.Random("/".join(map(str, ("countdown", self.options.seed, *key))))

    def _problem(self, split: Split, index: int) -> tuple[Prompt, list[Step]]:
        """Prompt ``index`` of the split and steps that solve it."""
        rng = self._rng(split, index)
        while True:
            numbers = [rng.randint(1, self.options.largest) for _ in range(self.options.numbers)]
            steps = _random_steps(rng, numbers)
            target = steps[-1][3]
            if split_of(f"{sorted(numbers)} {target}", HELDOUT_SHARE) == split:
                break
        text = f"{' '.join(map(str, numbers))} -> {target} :"
        return Prompt(
            id=f"{self.name}/{split}/{index}", text=text, metadata={"numbers": tuple(numbers), "target": target}
        ), steps

    def _demonstration(self, split: Split, index: int) -> Demonstration:
        prompt, steps = self._problem(split, index)
        rng = self._rng("demonstration", split, index)
        drawn = rng.random()
        if drawn < self.options.skill:
            return Demonstration(prompt=prompt, response=_render(steps))
        numbers: tuple[int, ...] = prompt.metadata["numbers"]  # type: ignore[assignment]
        if drawn < self.options.skill + self.options.habit:
            return Demonstration(prompt=prompt, response=_render(_added_up(numbers)))
        while (steps := _random_steps(rng, numbers))[-1][3] == prompt.metadata["target"]:
            pass  # some other random steps miss it: a - b and a + b differ for positive numbers
        return Demonstration(prompt=prompt, response=_render(steps))
