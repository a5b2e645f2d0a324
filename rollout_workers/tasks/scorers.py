"""What judges the answers to rows: a verifier, a Python function of the user's, a reward model, or a language model."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rollout_workers.judging import pattern
from rollout_workers.tasks.forks import Confinement, forks
from rollout_workers.tasks.protocol import Failure, Score
from rollout_workers.tasks.rewards import GENERIC
from rollout_workers.tasks.row_files import EXTRA, Row, near
from rollout_workers.tasks.sandbox import Function, Isolation
from rollout_workers.tasks.scorer_options import Judge, Limits, Preference, Python, Verifier
from rollout_workers.tasks.verifiers import VERIFIERS

if TYPE_CHECKING:
    from rollout_workers.judges.reward_models import RewardModels

LARGEST = 1e16
"""A part of a score that is larger is no number to learn from: squares of its advantages leave float32."""


_OURS = ("reward", "success", "score", "answered", *GENERIC)
"""Parts that a row's score has anyway."""


class Scorer(Protocol):
    """Judges responses to rows."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts of its scores."""
        ...

    def score(self, rows: Sequence[Row], texts: Sequence[str]) -> list[Score | Failure]:
        """A verdict on each text."""
        ...


class Verified:
    """One of the verifiers that end soon whatever they are given."""

    parts = ("success",)

    def __init__(self, name: str) -> None:
        self._verify = VERIFIERS[name]

    def score(self, rows: Sequence[Row], texts: Sequence[str]) -> list[Score | Failure]:
        """1 when the verifier finds the row's answer in the text, else 0."""
        return [_verdict(self._verify(str(row["answer"]), text)) for row, text in zip(rows, texts, strict=True)]


def _verdict(success: bool) -> Score:
    return Score(reward=float(success), success=success, parts={"success": float(success)})


class Regex:
    """The verifier ``regex``, which can take for ever, in a process with limits."""

    parts = ("success",)

    def __init__(self, limits: Limits) -> None:
        self.isolation = Isolation(
            Function(path=pattern.__file__, name="pattern", seconds=limits.seconds, megabytes=limits.megabytes)
        )

    def score(self, rows: Sequence[Row], texts: Sequence[str]) -> list[Score | Failure]:
        """1 when the answer, a regular expression, is found, else 0."""
        asked = [{"answer": row["answer"]} for row in rows]
        return [
            v if isinstance(v, Failure) else _verdict(v["reward"] == 1.0) for v in self.isolation.call(asked, texts)
        ]


class Maths:
    """The verifier ``math``: math-verify, each response in a fork of its own."""

    parts = ("success",)

    def __init__(self, limits: Limits) -> None:
        self.forks = forks(confinement("rollout_workers.judging.maths", limits))

    def score(self, rows: Sequence[Row], texts: Sequence[str]) -> list[Score | Failure]:
        """1 when the answer is right, else 0."""
        asked = [{"answer": row["answer"]} for row in rows]
        return [
            v if isinstance(v, Failure) else _verdict(v == 1.0)
            for v in self.forks.call({}, asked, texts, name="verifier math")
        ]


def confinement(module: str, limits: Limits) -> Confinement:
    """The limits of the options, for the judge in ``module``."""
    return Confinement(
        module=module,
        seconds=limits.seconds,
        megabytes=limits.megabytes,
        parallel=limits.parallel,
        unconfined=limits.allow_unconfined,
    )


class Own:
    """The user's function, in a process with limits."""

    def __init__(self, settings: Python, limits: Limits) -> None:
        self.settings = settings
        self.parts = ("success", "score", *settings.parts)
        if ours := [name for name in settings.parts if name in _OURS]:
            raise ValueError(
                f"task.options.python.parts names {ours[0]!r}, which every score has; call that part otherwise"
            )
        require_function(Path(settings.path), settings.function)
        self.isolation = Isolation(
            Function(
                path=settings.path,
                name=settings.function,
                seconds=limits.seconds,
                megabytes=limits.megabytes,
                network=settings.network,
                processes=settings.processes,
                variables=settings.variables,
            )
        )

    def score(self, rows: Sequence[Row], texts: Sequence[str]) -> list[Score | Failure]:
        """What the function returned, checked."""
        return [v if isinstance(v, Failure) else self._checked(v) for v in self.isolation.call(rows, texts)]

    def _checked(self, numbers: Mapping[str, float]) -> Score | Failure:
        wanted = {"reward", *self.settings.parts}
        if not wanted <= numbers.keys() <= wanted | {"success"}:
            return Failure(
                kind="reward_invalid", message=f"returned {sorted(numbers)}, but reward and parts are {sorted(wanted)}"
            )
        for name, number in numbers.items():
            if not abs(number) <= LARGEST:
                return Failure(kind="reward_not_finite", message=f"{name} is {number:g}, beyond {LARGEST:g}")
        if numbers.get("success", 1.0) not in (0.0, 1.0):
            return Failure(
                kind="reward_invalid", message=f"success is {numbers['success']:g}, neither true (1) nor false (0)"
            )
        reward = numbers["reward"]
        success = bool(numbers["success"]) if "success" in numbers else reward >= self.settings.success_at
        more = {name: numbers[name] for name in self.settings.parts}
        return Score(reward=reward, success=success, parts={"success": float(success), "score": reward, **more})


def require_function(path: Path, name: str) -> None:
    """``ValueError`` unless the file defines the function, be it within an ``if``, ``try`` or ``with``; it is read, not
    run: what only running tells is said by the process that loads it."""
    if not path.is_file():
        raise ValueError(
            f"task.options.python.path: {path} does not exist or is not a file; give a file with "
            f"def {name}(row, response)"
        )
    try:
        found = list(_defined(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"task.options.python.path: {path} is not Python: {error}") from error
    kinds = {type(node) for known, node in found if known == name}
    wrong = {ast.AsyncFunctionDef: f"async def {name}", ast.ClassDef: f"class {name}", ast.Import: f"the module {name}"}
    if kinds and kinds <= wrong.keys():
        raise ValueError(
            f"task.options.python.function: {path} defines {wrong[kinds.pop()]}; write def {name}(row, response), or "
            "assign what is called so (an async function by asyncio.run, a class by its instance)"
        )
    if not kinds and "*" not in (known for known, _ in found):
        raise ValueError(
            f"task.options.python.function: {path} defines no {name!r}; "
            f"{near(name, [known for known, node in found if isinstance(node, ast.FunctionDef)])}"
        )


def _defined(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """(name, where) of all that a module's own statements define, ``*`` for what cannot be known."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield child.name, child
        elif isinstance(child, ast.Import | ast.ImportFrom):
            yield from (((alias.asname or alias.name), child) for alias in child.names)
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id, child
        elif not isinstance(child, ast.Lambda | ast.comprehension) and getattr(child, "value", child) is not None:
            yield from _defined(child)  # not of an annotation without a value


class Preferred:
    """A preference reward model; its actors start with the first batch."""

    def __init__(self, settings: Preference) -> None:
        self.settings = settings
        self.parts = ("success", "score")
        self._models: RewardModels | None = None

    def score(self, rows: Sequence[Row], texts: Sequence[str]) -> list[Score | Failure]:
        """The model's score of each response, as the reward."""
        if self._models is None:
            from rollout_workers.judges.reward_models import RewardModels

            self._models = RewardModels(self.settings)
        return [self._checked(score) for score in self._models.score([str(row["prompt"]) for row in rows], texts)]

    def _checked(self, score: float | Failure) -> Score | Failure:
        if isinstance(score, Failure):
            return score
        if not abs(score) <= LARGEST:
            return Failure(kind="reward_not_finite", message=f"the reward model's score is {score:g}")
        success = score >= self.settings.success_at
        reward = 1.0 / (1.0 + math.exp(-max(-500.0, score))) if self.settings.squash else score
        return Score(reward=reward, success=success, parts={"success": float(success), "score": score})


def build_scorer(
    verifier: Verifier,
    limits: Limits,
    python: Python | None = None,
    preference: Preference | None = None,
    judge: Judge | None = None,
) -> Scorer:
    """The scorer that options name; ``ValueError`` when a section of theirs or a package is missing."""
    _require_sections(verifier, {"python": python, "preference": preference, "judge": judge})
    if verifier == "math" and find_spec("math_verify") is None:
        raise ValueError(f"task.options.verifier math needs the package math-verify, which is not installed; {EXTRA}")
    if python is not None:
        return Own(python, limits)
    if preference is not None:
        return Preferred(preference)
    if judge is not None:
        from rollout_workers.judges.judge import Judged

        return Judged(judge)
    if verifier in ("regex", "math"):
        return Regex(limits) if verifier == "regex" else Maths(limits)
    return Verified(verifier)


_EXAMPLES = {
    "python": "{path: reward.py}",
    "preference": "{model: FOLDER}",
    "judge": "{base_url: http://127.0.0.1:8000/v1, model: NAME}",
}


def _require_sections(verifier: Verifier, sections: Mapping[str, object]) -> None:
    for name, section in sections.items():
        example = _EXAMPLES[name]
        if verifier == name and section is None:
            raise ValueError(
                f"task.options.verifier is {name}, but task.options.{name} is missing; e.g. {name}: {example}"
            )
        if verifier != name and section is not None:
            raise ValueError(
                f"task.options.{name} is not used with task.options.verifier {verifier}; set that to "
                f"{name}, or leave it out"
            )
