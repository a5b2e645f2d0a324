"""The verifier ``math``, for ``zygote``: math-verify, which reads LaTeX and has sympy's parser evaluate the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from rollout_workers.judging.expressions import Guard
from rollout_workers.judging.outcome import Stopped

LONGEST = 20_000
"""Characters of a response that are parsed, the last ones: the answer stands at the end."""
_guard = Guard()


def make(settings: Mapping[str, Any]) -> Callable[[Any, str], float]:
    """Whether the response's last answer (boxed, LaTeX or plain) equals the row's, as 1 or 0; it has no settings."""
    from math_verify import parse, verify

    assert not settings, settings
    _guard.install("sympy.parsing.sympy_parser")

    @lru_cache(maxsize=4096)
    def gold(answer: str) -> Any:
        # Bare LaTeX such as \frac{1}{2} needs its dollars.
        return parse(answer if "$" in answer or "\\boxed" in answer else f"${answer}$", parsing_timeout=None)

    def judge(row: Any, response: str) -> float:
        _guard.close()
        return judged(row, response)

    def judged(row: Any, response: str) -> float:
        known = gold(str(row["answer"]))
        _guard.refused = ""
        # The process around this has the time limit; math-verify's own uses signals.
        right = verify(known, parse(response[-LONGEST:], parsing_timeout=None), timeout_seconds=None)
        if _guard.refused:
            raise Stopped("verifier_refused", f"the answer is code ({_guard.refused}), which is not run")
        return float(bool(right))

    judged({"answer": "\\frac{1}{2}"}, "$0.5$")
    return judge
