"""Verifiers of rows: does a text give the row's answer? The standard library only, for ``judging.function`` loads this
file by its path."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

NUMBER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,30})(?:\.[0-9]{1,30})?")
_CLOSE = 1e-6


def exact(answer: str, text: str) -> bool:
    """Whether both are the same but for blanks and case."""
    return " ".join(text.split()).casefold() == " ".join(answer.split()).casefold()


def contains(answer: str, text: str) -> bool:
    """Whether ``text`` has the answer in it as whole words, blanks and case aside."""
    wanted, found = (" ".join(t.split()).casefold() for t in (answer, text))
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", found) is not None


def number(answer: str, text: str) -> bool:
    """Whether the last number in ``text`` is the last one in ``answer``, to one part in a million."""
    wanted, found = last_number(answer), last_number(text)
    return wanted is not None and found is not None and abs(wanted - found) <= _CLOSE * max(1.0, abs(wanted))


def last_number(text: str) -> float | None:
    """``1234.5`` of ``"about 1,234.5 euros"``."""
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def pattern(answer: str, text: str) -> bool:
    """Whether the answer, read as a regular expression, is found in ``text``."""
    return re.search(answer, text) is not None


VERIFIERS: Mapping[str, Callable[[str, str], bool]] = {"exact": exact, "number": number, "contains": contains}
"""Those that end soon whatever they are given."""


def regex_reward(row: Mapping[str, Any], response: str) -> bool:
    """``pattern`` for a row."""
    return pattern(str(row["answer"]), response)
