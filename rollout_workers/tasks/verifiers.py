"""Verifiers of rows that end soon whatever they are given: does a text give the row's answer?"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from rollout_workers.judging.maths import SAYS, final
from rollout_workers.judging.numerals import close, last_number, number_of, numbers
from rollout_workers.judging.texts import LONGEST, folded, joined, last_box, said
from rollout_workers.judging.units import last_quantity, same

_INSIDE = re.compile(r"[0-9][.,]$|(?:^|[^\w)\]}])-$")
"""Before a digit: that digit goes on with a number."""
_WORD, _LIST = re.compile(r"[^\W\d_]{2,}"), re.compile(r"[(\[{][^)\]}]*,|[0-9]!")
_AFTER = re.compile(r"\n|[.!?][\s*]|。|; |\s\(|[,.]? (?=(?:not|because|since|as|for|which|so|I|we)\b)")
"""What parts an answer from what is said of it."""
_SENTENCE = 4
"""Words from which a text is a sentence, whose last number is meant."""


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
        if not _joined(found[max(0, place - 2) : place], wanted[0], wanted[-1], found[end : end + 2]):
            return True
        place = found.find(wanted, place + 1)
    return False


def _joined(before: str, first: str, last: str, after: str) -> bool:
    """Whether what stands around goes on with the first or last word, or number: ``5 cm`` is not in ``2.5 cm``."""
    if joined(before[-1:], first) or joined(last, after[:1]):
        return True
    if last.isalpha() and re.match(r"\+\+|#|\+(?!\w)", after):  # C++, C#, A+
        return True
    return bool((first.isdigit() and _INSIDE.search(before)) or (last.isdigit() and re.match("[.,][0-9]", after)))


def number(answer: str, text: str) -> bool:
    """Whether the number that ``text`` gives is the one that ``answer`` gives: the last one, in the last box or behind
    ``the answer is`` where there is such.

    Whole numbers must be the same; others to one part in a million, and no further apart than a millionth where one of
    the two is whole. Units that both have must agree, or be converted (``5 km`` is 5000 m and not 5 miles).
    """
    wanted, found = _meant(answer), _meant(text)
    value = next(iter(last_number(wanted)), None)
    if value is None:
        return False
    alike = same(last_quantity(wanted), last_quantity(found))
    return any(close(value, one) for one in last_number(found)) if alike is None else alike


def _meant(text: str) -> str:
    """The part of a text whose last number is its answer."""
    text = said(text[-LONGEST:])
    box = last_box(text)
    if box and re.search(r"\w", box):
        return box
    answer = _AFTER.split(SAYS.split(text)[-1].strip(), maxsplit=1)[0] if SAYS.search(text) else ""
    return answer if last_number(answer) else text


def _several(answer: str) -> bool:
    """Whether a short answer is a list, a range, a time, a date or a calculation, and no single number."""
    if len(_WORD.findall(answer)) >= _SENTENCE or "=" in answer:
        return False
    return len({readings[:1] for readings in numbers(answer)}) > 1 or _LIST.search(answer) is not None


VERIFIERS: Mapping[str, Callable[[str, str], bool]] = {"exact": exact, "number": number, "contains": contains}


def answer_problem(verifier: str, answer: str) -> str | None:
    """Why ``verifier`` cannot use this answer, or ``None``."""
    other = "mend it, or set task.options.verifier: exact"
    if verifier == "number" and not last_number(_meant(answer)):
        return f"is {answer[:60]!r} without a number that can be read; {other}"
    if verifier == "number" and _several(final(said(answer))):
        return f"is {answer[:60]!r}, of which the verifier number would compare the last number alone; {other}"
    if verifier in ("exact", "contains") and not folded(answer):
        return f"is {answer[:60]!r}, which is blank; mend or remove the row"
    if verifier == "regex":
        try:
            re.compile(answer)
        except (re.error, RecursionError, OverflowError) as error:
            return f"is not a regular expression ({error}): {answer[:60]!r}; {other}"
    return None
