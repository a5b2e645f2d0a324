"""The verifier ``math``, for ``zygote``: math-verify, which reads LaTeX and has sympy's parser evaluate the rest."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from rollout_workers.judging.expressions import Guard
from rollout_workers.judging.numerals import number_of
from rollout_workers.judging.outcome import TypedFailure
from rollout_workers.judging.texts import LONGEST, last_box, plain, said
from rollout_workers.judging.units import same

LONGEST_FORMULA = 500
"""Characters of a last line that is read as a formula without being marked as one."""
_guard = Guard()
_FORMULA = re.compile(r"(?<!\\)\$\$?((?:[^$\\]|\\.)+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
SAYS = re.compile(
    r"(?i:####|\banswer ?:|\b(?:answer|option|choice) is\b ?:?)|答案(?:[是为為] ?:?|:)|答え(?:[はが]|:)|답(?:[은는]|:)"
)
"""What stands before an answer."""
_ALONE = r"\b(?!\s*[-+*/=^(])(?![\s),/&]*(?:(?:or|and)\b)?[\s(]*[A-H]\b)"
_CHOICE, _MARKED_CHOICE = re.compile(rf"\W{{0,3}}([A-H]){_ALONE}"), re.compile(rf"(?=\(?.[).:])\(?([A-H]){_ALONE}")
_LABEL = re.compile(r"[^\W\d_]{3,}(?: [^\W\d_]+){0,3} ?:[ *]*(?=\S+$)")
_NO_WORD = r"(?<![\\A-Za-z])(?!(?:sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|in|or|and|mod|lim|max|min|gcd|lcm)\b)"
_WORD, _PROSE = re.compile(_NO_WORD + "[A-Za-z]{3,}"), re.compile(_NO_WORD + "[A-Za-z]{2,} ")
_STYLE = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s?\{([^{}]*)\}")
_BASE = re.compile(r"[0-9A-F]_\{?(\d+)\}?$")
_BLANKS = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[,!;: ]|(?<!\d) | (?!\d)|[$~]|\*\*")
_ROOT = re.compile(r"(?:√|\\sqrt(?=\s?\())\s?(\d+|\w|\([^()]*\))")
_UPRIGHT = re.compile(r"\\math(?:rm|bf|it)\s?\{(\w)\}")
_DOTS = re.compile(r"\\[lc]?dots|,\s?(?:\.\.\.|…)")
_REPEATING = re.compile(r"(\d{1,30})\.(\d{0,30})\\overline\s?\{?(\d{1,30})\}?")
_SIGNS = str.maketrans(
    {"π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "×": r"\times ", "÷": r"\div "}
    | {"·": r"\cdot ", "°": r"^\circ ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ", "±": r"\pm "}
)


def make(settings: Mapping[str, Any]) -> Callable[[Any, str], float]:
    """Whether the response's last answer (boxed, LaTeX or plain) equals the row's, as 1 or 0; it has no settings.

    Both are read by the same function. What equals the answer letter by letter is right, mathematics or not; an answer
    of words is compared so alone, for as a product of letters ``east`` would be ``seat``.
    """
    from math_verify import verify

    assert not settings, settings
    _guard.install("sympy.parsing.sympy_parser")
    gold = lru_cache(maxsize=4096)(_read)

    def judge(row: Any, response: str) -> float:
        _guard.close()
        return judged(row, response)

    def judged(row: Any, response: str) -> float:
        answer, text = said(_plain(str(row["answer"]))), said(_plain(response[-LONGEST:]))
        wanted = _letters(final(answer))
        if not wanted or wanted.count("{") != wanted.count("}"):
            raise TypedFailure("verifier_error", f"the answer {answer[:60]!r} is blank, or its braces do not match")
        choice = _choice(text) if len(wanted) == 1 else None
        if wanted in (_letters(text), _letters(final(text)), choice and choice[1]):
            return 1.0
        words = not re.search(r"[\d\\]", wanted) and _WORD.search(wanted)
        bases = [_BASE.search(_letters(final(each))) for each in (answer, text)]  # math-verify drops them
        if words or (bases[0] and bases[1] and bases[0][1] != bases[1][1]):
            return 0.0
        if (alike := same(_ending(answer), _ending(text))) is not None:
            return float(alike)
        if _DOTS.search(wanted):  # math-verify reads the first number of such a list alone
            return 0.0
        _guard.refused = ""
        # The process around this has the time limit; math-verify's own uses signals.
        found = _read(text)
        right = verify(
            gold(answer), found, timeout_seconds=None, allow_set_relation_comp=True
        )  # x <= 3 for an interval
        right = right and not _apart(gold(answer), found)
        if _guard.refused:
            raise TypedFailure("verifier_refused", f"the answer is code ({_guard.refused}), which is not run")
        return float(bool(right))

    # What first calls import and compile is here for all forks.
    for text in ("$0.5$", "\\boxed{x^2}", "It is 0.5 or so", "[1, 2] = \\sqrt{x}"):
        judged({"answer": "\\frac{1}{2}"}, text)
    return judge


def _plain(text: str) -> str:
    """One form of what Unicode and LaTeX write in several ways: ``√2``, ``\fbox``, ``0.\\overline{3}``."""
    text = _UPRIGHT.sub(r"\1", _ROOT.sub(r"\\sqrt{\1}", plain(text.strip()))).translate(_SIGNS)
    return _REPEATING.sub(_fraction, text.replace(r"\fbox", r"\boxed").replace(r"\framebox", r"\boxed"))


def _fraction(found: re.Match[str]) -> str:
    whole, once, again = found.groups()
    below = (10 ** len(again) - 1) * 10 ** len(once)
    return rf"\frac{{{int(whole + once + again) - int(whole + once)}}}{{{below}}}"


def _choice(text: str) -> re.Match[str] | None:
    """The letter that a text chooses, behind ``answer is`` or marked as one (``B) 42``); none where it names two."""
    return _CHOICE.match(SAYS.split(text)[-1]) if SAYS.search(text) else _MARKED_CHOICE.match(final(text))


def _apart(gold: list[Any], found: list[Any]) -> bool:
    """Whether both are real numbers, and no two readings agree to one part in a million: math-verify rounds at the
    sixth place, where 1e-8 is 1e-9."""
    import sympy

    values = [one for one in (*gold, *found) if not isinstance(one, str)]
    if not all(isinstance(one, sympy.Expr) and one.is_number and one.is_real and one.is_finite for one in values):
        return False
    numbers, others = ([sympy.N(one, 15) for one in some if not isinstance(one, str)] for some in (gold, found))
    close = (abs(one - two) <= 1e-6 * max(abs(one), abs(two)) for one in numbers for two in others)
    return bool(numbers and others) and not any(close)


def final(text: str) -> str:
    """The answer that a text ends with: what its last box holds, else what follows ``answer is`` or ``####``, else its
    last line without a label (``Sum: 7``); of these the formula where there is one."""
    line = _line(text)
    formulas = [_inside(found) for found in _FORMULA.finditer(line)] if last_box(text) is None else []
    return formulas[0].strip() if len(formulas) == 1 else line


def _inside(formula: re.Match[str]) -> str:
    return next(filter(None, formula.groups()))


def _ending(text: str) -> str:
    """As ``final``, with the unit that follows the formula or the box."""
    if (box := last_box(text)) is None or text.count("\\boxed") > 1:
        return _FORMULA.sub(_inside, _line(text))
    unit = re.match(r"[}$\\) ]*([^\n.;,=]*)", text.rpartition(box)[2])
    return f"{box} {unit[1] if unit else ''}".strip()


def _line(text: str) -> str:
    if (box := last_box(text)) is not None:
        return box.strip()
    lines = (SAYS.split(text)[-1].strip(" *:\n") or text).splitlines()
    line = (lines[0] if SAYS.search(text) else lines[-1]).strip(" *:") if lines else ""
    line = _LABEL.sub("", line, count=1) if _LABEL.match(line) else line
    return line.removesuffix(".").removesuffix("。")


def _letters(text: str) -> str:
    """What is compared letter by letter: without blanks, sizes and fonts; words without case; a choice without its
    brackets."""
    while (shown := _STYLE.sub(r"\1", text)) != text:
        text = shown
    text = " ".join(text.split())
    words = _WORD.search(text) and "\\" not in text
    bare = _BLANKS.sub("", text).removesuffix(".").replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    bare = re.sub(r"^\(([A-Za-z])\)$", r"\1", bare)
    return bare.casefold() if words else bare


def _read(text: str) -> list[Any]:
    """The expressions that a text may mean: a number by our own rule (but for percentages), else what math-verify
    reads."""
    import sympy
    from math_verify import parse

    last, boxed = final(text), "\\boxed" in text
    prose = bool(_PROSE.search(last)) or len(last) > LONGEST_FORMULA
    formula = not prose and (last_box(text) is not None or not _FORMULA.search(text))
    found = parse(f"${last}$", parsing_timeout=None) if formula else []
    found = [] if any(isinstance(one, str) and one.count("{") != one.count("}") for one in found) else found  # a piece
    value = None if "%" in last else number_of(last)
    if prose or not formula or (boxed and (value is None or text.count("\\boxed") > 1)):
        found += parse(text, parsing_timeout=None)
    if value is None:
        return found
    number = sympy.Rational(value.numerator, value.denominator)
    exact = value.denominator == 1 or "/" in last or "frac" in last
    return [number if exact else number.evalf(15), *(found if "," in last or boxed else [])]
