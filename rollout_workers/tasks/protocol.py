"""What a task is: prompts, demonstrations and a verifier, all deterministic by (split, index)."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from rollout_workers.lazy_sequence import LazySequence
from rollout_workers.tasks.sampled_ids import SampledIds

__all__ = [
    "Demonstration",
    "Failure",
    "LazySequence",
    "Prompt",
    "Score",
    "ScoresBatches",
    "Split",
    "Task",
    "after_prompt",
    "options_of",
    "require_split",
    "score_all",
    "split_of",
]

Split = Literal["train", "heldout"]
Kind = TypeVar("Kind")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One question.

    ``Prompt(id="countdown/heldout/17", text="3 7 25 -> 29 :", metadata={"numbers": (3, 7, 25), "target": 29})``
    """

    id: str
    """``<task>/<split>/<index>``."""
    text: str
    """What the model is given, few-shot examples included."""
    metadata: Mapping[str, object]
    """What the verifier needs; the model never sees it."""
    turns: tuple[tuple[str, str], ...] = ()
    """(role, content) of each message where the prompt is a conversation; a chat template is given these."""
    tools: tuple[Mapping[str, object], ...] = ()
    """Functions that the model may call, as OpenAI's protocol describes them; for a chat template."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Demonstration:
    """A prompt with a response, the end token not included."""

    prompt: Prompt
    response: str
    later: tuple[tuple[str, str], ...] = ()
    """(observation, response) of each further turn; none where one response is all."""
    ids: SampledIds | None = None
    """The tokens that prompt and response are, end token included, where they were sampled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A verdict. ``Score(reward=0.0, success=False, parts={"success": 0.0, "format": 1.0})``."""

    reward: float
    success: bool
    parts: Mapping[str, float]
    """Named parts that are logged; ``reward`` is not necessarily their sum."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The verifier could not judge: the rollout is masked, never scored 0."""

    kind: str
    """A short class of failures, e.g. ``verifier_error``."""
    message: str


class Task(Protocol):
    """Prompts and their verifier."""

    name: str

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that every score has, e.g. ``("success", "format")``."""
        ...

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The prompts of a split; built when indexed, the same for the same index, disjoint between splits."""
        ...

    def demonstrations(self, split: Split) -> Sequence[Demonstration]:
        """Texts to train on; element i answers prompt i of the split."""
        ...

    def score(self, prompt: Prompt, text: str) -> Score | Failure:
        """Judge a response to ``prompt``. Never raises because of ``text``."""
        ...


@runtime_checkable
class ScoresBatches(Protocol):
    """A task that judges many responses faster together than one by one."""

    def score_batch(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Score | Failure]:
        """As ``Task.score`` of each pair."""
        ...


def score_all(task: Task, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Score | Failure]:
    """A verdict on each text, together where the task can."""
    if isinstance(task, ScoresBatches):
        return task.score_batch(prompts, texts)
    return [task.score(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]


def split_of(key: str, heldout_share: float) -> Split:
    """The split that a problem belongs to, by a hash of the problem itself: no problem can be in both."""
    draw = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "heldout" if draw < heldout_share else "train"


def options_of(kind: type[Kind], task: str, options: Mapping[str, Any]) -> Kind:
    """``task.options`` of a task as the dataclass ``kind``, which checks the values.

    Raises:
        ValueError: a key is unknown (the nearest known one is named), or a value is out of range.
    """
    known = tuple(kind.__dataclass_fields__)  # type: ignore[attr-defined]
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"task.options.{key} is not an option of {task}; {hint}")
    return kind(**options)


def after_prompt(text: str) -> str:
    """What stands between a prompt and the response that completes it: a space, as in running text."""
    return "" if text[-1:].isspace() else " "


def require_split(split: str) -> None:
    """Raise ``ValueError`` unless ``split`` is a split."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'heldout'")
