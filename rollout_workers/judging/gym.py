"""reasoning-gym's own verifiers, for ``zygote``: ``make`` is called once for each dataset, what it returns once for
each answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rollout_workers.judging.expressions import Guard
from rollout_workers.judging.outcome import Caught, TypedFailure

# What a verifier can raise on an odd answer. Anything else is a defect and should be seen.
ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    SyntaxError,
    RecursionError,
)
_guard = Guard()


def make(settings: Mapping[str, Any]) -> Callable[[Any, str], float]:
    """The verifier of ``{"dataset": "gcd", "seed": 0, "size": 20000, "options": {}}``: entry and answer in, mark
    out."""
    import sympy.parsing.sympy_parser
    from reasoning_gym import create_dataset

    dataset: Any = create_dataset(
        settings["dataset"], seed=settings["seed"], size=settings["size"], **settings["options"]
    )
    _guard.install("reasoning_gym")
    _guard.install("sympy.parsing.sympy_parser")
    with Caught():  # imports and fills what the first verdict needs; some have no gold answer, and some raise
        entry = dataset[0]
        dataset.score_answer(entry["answer"], entry)
        sympy.parsing.sympy_parser.parse_expr("2*x + 1")

    def mark(entry: Any, answer: str) -> float:
        _guard.refused = ""
        _guard.close()
        with Caught() as judged:
            value = dataset.score_answer(answer, entry)
        if _guard.refused:
            raise TypedFailure(
                "verifier_refused", f"the answer is code ({_guard.refused}), which is not run (answer {answer[:80]!r})"
            )
        if isinstance(judged.error, ERRORS):
            raise TypedFailure(
                "verifier_error", f"{type(judged.error).__name__}: {judged.error} (answer {answer[:80]!r})"
            )
        if judged.error is not None:
            raise judged.error
        return float(value)

    return mark
