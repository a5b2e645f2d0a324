"""The verifier ``math``: math-verify. ``isolated`` loads this file by its path, so the import counts as loading, not as judging."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

LONGEST = 20_000
"""Characters of a response that are parsed, the last ones: the answer stands at the end."""


def math_reward(row: Mapping[str, Any], response: str) -> bool:
    """Whether the response's last answer (boxed, LaTeX or plain) equals the row's."""
    # The process around this has the time limit; math-verify's own uses signals.
    return bool(verify(_gold(str(row["answer"])), parse(response[-LONGEST:], parsing_timeout=None), timeout_seconds=None))


@lru_cache(maxsize=4096)
def _gold(answer: str) -> Any:
    """The answer as math-verify reads it; bare LaTeX such as ``\\frac{1}{2}`` needs its dollars."""
    return parse(answer if "$" in answer or "\\boxed" in answer else f"${answer}$", parsing_timeout=None)
