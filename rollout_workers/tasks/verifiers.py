"""Verifiers of rows that end soon whatever they are given: does a text give the row's answer?"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fractions import Fraction

from rollout_workers.judging.numerals import last_number, number_of, numbers
from rollout_workers.judging.texts import LONGEST, folded, joined, last_box

_CLOSE = Fraction(1, 10**6)


def exact(answer: str, text: str) -> bool:
    """Whether both are the same but for blanks, case and the form in which Unicode writes them."""
    return folded(answer) == folded(text)


def contains(answer: str, text: str) -> bool:
    """Whether the text has the answer in it as whole words, compared as ``exact`` does; of an answer that is a number,
    whether one of the text's numbers equals it."""
    if (value := number_of(answer)) is not None:
        return any(value in readings for readings in numbers(text))
    wanted, found = folded(answer), folded(text)
    place = found.find(wanted)
    while place >= 0:
        end = place + len(wanted)
        if not joined(found[max(0, place - 1) : place], wanted[:1]) and not joined(wanted[-1:], found[end : end + 1]):
            return True
        place = found.find(wanted, place + 1)
    return False


def number(answer: str, text: str) -> bool:
    """Whether the last number in ``text``, or in its last box, is the last one in ``answer``.

    Whole numbers must be the same; others to one part in a million, and no further apart than a millionth where one of
    the two is whole.
    """
    wanted = next(iter(_marked(answer)), None)
    return wanted is not None and any(_close(wanted, found) for found in _marked(text))


def _marked(text: str) -> tuple[Fraction, ...]:
    box = last_box(text[-LONGEST:])
    return (last_number(box) if box is not None else ()) or last_number(text)


def _close(wanted: Fraction, found: Fraction) -> bool:
    room = max(abs(wanted), abs(found))
    if 1 in (wanted.denominator, found.denominator):
        room = min(room, Fraction(1))
    return abs(wanted - found) <= _CLOSE * room


VERIFIERS: Mapping[str, Callable[[str, str], bool]] = {"exact": exact, "number": number, "contains": contains}


def answer_problem(verifier: str, answer: str) -> str | None:
    """Why ``verifier`` cannot use this answer, or ``None``."""
    other = "mend it, or set task.options.verifier: exact"
    if verifier == "number" and not _marked(answer):
        return f"is {answer[:60]!r} without a number that can be read; {other}"
    if verifier in ("exact", "contains") and not folded(answer):
        return f"is {answer[:60]!r}, which is blank; mend or remove the row"
    if verifier == "regex":
        try:
            re.compile(answer)
        except (re.error, RecursionError, OverflowError) as error:
            return f"is no regular expression ({error}): {answer[:60]!r}; {other}"
    return None
