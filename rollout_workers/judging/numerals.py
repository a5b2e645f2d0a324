r"""What a number is, for everything here that asks: verifiers, ``init``, checks of rows, readers of data sets.

Digits of every script; a sign (not the dash in ``10-4``); ``1,000``, ``1 000``, ``1_000``, ``1'000``, ``12,34,567``,
``1.234.567`` and ``1.234,5``; ``.5``; ``1e-3``, ``3 x 10^{-3}``, ``2^10``; ``1/2``, ``2 1/2``, ``\frac{1}{2}``.
A comma that no grouping explains is a decimal comma, or parts a list: ``2,3`` reads as 2.3, and as 2 and 3.
``0x1F``, ``0b101``, ``0o17``; ``2.5 million``. Signs of percent and of currencies, and units, are no part of the
number: ``50 %`` is 50. A formula of roots, functions or constants (``2\sqrt{3}``) is no number that can be read.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction

from rollout_workers.judging.texts import LONGEST, plain

LARGEST = 10_000
"""Digits, before or behind the point, of a number that is read."""
_LETTER = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u0370-\u058f"
"""Digits behind these belong to a name: ``x2``, ``CO2``."""
_NUMBER = re.compile(
    rf"""
    (?<![{_LETTER}0-9^]) (?<![{_LETTER}]_) (?<!\^-) (?<![\^_]\{{) (?<!\^\{{-)
    (?P<listed> (?<=[0-9],) )? (?P<over> (?<=/) | (?<=/[ ]) )?
    (?P<sign> (?<![{_LETTER}0-9)\]}}]) [-+] )? (?: \\?[$\u00a2-\u00a5\u20a0-\u20c0] [ ]? (?P<inner> [-+] )? )?
    (?:
        (?P<whole> [0-9]{{1,9}}+ ) [ ] (?P<part> [0-9]{{1,9}}+ / [0-9]{{1,9}}+ ) (?! [ ]?/ | [.,][0-9] )
      | (?P<dots> [1-9][0-9]{{0,2}} (?: (?: \.[0-9]{{3}} ){{2,}}+ (?: ,[0-9]++ )? | \.[0-9]{{3}},[0-9]++ ) )
        (?! [0-9] | [.,][0-9] )
      | (?P<digits>
            [1-9][0-9]{{0,2}} (?P<by> [ ,_'] ) [0-9]{{3}} (?![0-9]) (?: (?P=by) [0-9]{{3}} (?![0-9]) )*+
            (?! (?P=by)[0-9] )
          | [1-9][0-9]? (?: ,[0-9]{{2}} (?![0-9]) ){{1,9}} ,[0-9]{{3}} (?! [0-9] | ,[0-9] )
          | [0-9]++
          | (?<!\.) (?= \.[0-9] )
        )
        (?: (?P<point> \.[0-9]++ ) | (?P<comma> (?(listed) (?!) | ,[0-9]++ (?! [.,][0-9] ) ) ) )?
        (?: [eE] (?P<exponent> [-+]?[0-9]{{1,9}}+ ) (?![{_LETTER}])
          | [ ]? (?: [\u00d7xX*\u00b7\u22c5] | \\times | \\cdot ) [ ]{{0,2}} 10 [ ]? (?: \^|\*\* ) [ ]?
            [{{(]? (?P<ten> [-+]?[0-9]{{1,9}}+ ) (?! \.?[0-9] | / ) [)}}]?
          | [ ]? (?: \^|\*\* ) [ ]? [{{(]? (?P<power> [-+]?[0-9]{{1,9}}+ ) (?! \.?[0-9] | / ) [)}}]?
          | (?(over) (?!) | [ ]?/[ ]? (?P<under> [0-9]++ (?: \.[0-9]++ )? ) (?! [ ]?/ | ,[0-9] ) )
          | [ ] (?P<large> (?i: dozen | hundred | thousand | million | billion | trillion ) ) \b
        )?
    )
    (?! [ ]? (?: \^ (?! [ {{]*+ (?: \\circ | (?: \\text\{{ )? (?: st | nd | rd | th ) ) ) | \*\* [ ]?[-+0-9a-z{{(] ) )
    """,
    re.VERBOSE,
)
_CLOSE, _CENT = Fraction(1, 10**6), Fraction(1, 100)
_LARGE = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_BASED = re.compile(rf"(?<![{_LETTER}0-9_.])0(?:[xX][0-9a-fA-F]{{1,1000}}|[bB][01]{{1,3000}}|[oO][0-7]{{1,1000}})\b")
_UNREAD = "\u221a"
_FORMULA = re.compile(
    r"""
    (?: (?<![0-9.,/]) [0-9] [0-9.,/]*+ [ ]? )?
    (?: \\(?: sqrt | [cdt]?frac | pi | log | ln | lg | exp | sin | cos | tan | cot | sec | csc | arc[a-z]+ | d?binom
           | overline | infty | sum | int | prod | lim ) (?![A-Za-z])
      | [_^] \{ (?= [^{}]* [^-+0-9{} ] ) (?! [ ]? (?: \\circ | (?: \\text\{ )? (?: st | nd | rd | th ) ) ) [^{}]*+ \}
      | [\u221a-\u221c\u03c0\u221e] | (?<![A-Za-z]) (?: sqrt | cbrt | log | ln | exp | sin | cos | tan | pi ) (?=\() )
    (?: [ ]? [_^]? (?: \{ (?: [^{}] | \{[^{}]*\} )*+ \} | \[ [^]{}]*+ \] ) )*+
    [0-9A-Za-z.(){}+*/^_!-]*+ (?: [ ] [0-9][0-9.]*+ )?
    (?: [ ]? (?: \\cdot | \\times | [-+*/\u00d7\u00b7] ) [ ]? [^\s$,;=\\]++ )*+
    """,
    re.VERBOSE,
)
"""What is worked out: its digits are no numbers of their own."""
_CURRENCY = re.compile("[ $\u00a2-\u00a5\u20a0-\u20c0]*")
_PART = r"(?:\{{ ?(?P<sign_{0}>[-+]?) ?(?P<{0}>[0-9][0-9, _']*+(?:\.[0-9]++)?) ?\}}|(?P<digit_{0}>[0-9]))"
_FRACTION = re.compile(rf"(?:(?P<whole>[0-9]) ?)?\\[cdt]?frac ?{_PART.format('over')} ?{_PART.format('under')}")
_TYPESET = ((r"{,}", ","), (r"\!", ""), (r"\,", " "), ("\\ ", " "), (r"\%", "%"))


def numbers(text: str) -> Iterator[tuple[Fraction, ...]]:
    """Each number in the last ``LONGEST`` characters, exact, by all its readings, the likeliest first; none where it is
    too large to be read, or divided by 0."""
    yield from map(_readings, _NUMBER.finditer(_untypeset(text[-LONGEST:])))


def last_number(text: str) -> tuple[Fraction, ...]:
    """The readings of the last number: ``(Fraction(2469, 2),)`` of ``"about 1,234.5 euros"``; none without a number, or
    where a formula follows it."""
    found = _last(text)
    return () if found is None else _readings(found)


def last_written(text: str) -> tuple[str, str]:
    """The last number as it is written, and what follows it: ``("$5", " each")``; blanks where ``last_number`` has
    none."""
    found = _last(text)
    return ("", "") if found is None else (found[0], found.string[found.end() :])


def _last(text: str) -> re.Match[str] | None:
    text = _untypeset(text[-LONGEST:])
    found = deque(_NUMBER.finditer(text), maxlen=1)
    return found[0] if found and _UNREAD not in text[found[0].end() :] else None


def number_of(text: str) -> Fraction | None:
    """The number that the text is, with nothing beside it but a currency, a percent sign or a full stop; digits with a
    leading 0 (``007``) are a name."""
    bare = _untypeset(text[:LONGEST]).strip().strip("$").removesuffix(".").strip().removesuffix("%").strip()
    found = _NUMBER.match(bare)
    if found is None or re.match("[-+]?0[0-9]", bare) or not _CURRENCY.fullmatch(bare, found.end()):
        return None
    return next(iter(_readings(found)), None)


def close(one: Fraction, two: Fraction) -> bool:
    """Whether two numbers are the same: whole ones exactly, others to one part in a million, and less than a hundredth
    apart; no further than a millionth where one of the two is whole."""
    room = max(abs(one), abs(two))
    if 1 in (one.denominator, two.denominator):
        room = min(room, Fraction(1))
    return abs(one - two) <= _CLOSE * room and abs(one - two) < _CENT


def _untypeset(text: str) -> str:
    """Plain, LaTeX's blanks and fractions written out, other bases in tens, formulas as ``_UNREAD``."""
    text = plain(text)
    if "\\" in text or "{" in text:
        for typeset, written in _TYPESET:
            text = text.replace(typeset, written)
        text = _FRACTION.sub(_one_line, text)
    return _BASED.sub(lambda based: str(int(based[0], 0)), _FORMULA.sub(_UNREAD, text))


def _one_line(fraction: re.Match[str]) -> str:
    r"""``2 1/2`` of ``2\frac{1}{2}``, ``-1/2`` of ``\frac{1}{-2}``."""
    over, under = (re.sub("[ ,_']", "", fraction[part] or fraction[f"digit_{part}"]) for part in ("over", "under"))
    sign = "-" if (fraction["sign_over"] == "-") != (fraction["sign_under"] == "-") else ""
    return f"{fraction['whole'] + ' ' if fraction['whole'] else ''}{sign}{over}/{under}"


def _readings(found: re.Match[str]) -> tuple[Fraction, ...]:
    sign = -1 if "-" in (found["sign"], found["inner"]) else 1
    try:
        if found["whole"]:
            return (sign * (int(found["whole"]) + Fraction(found["part"])),)
        if found["dots"]:
            return (sign * _fraction(found["dots"].replace(".", "").replace(",", ".")),)
        digits = re.sub("[ ,_']", "", found["digits"]) or "0"
        value = _fraction(digits + (found["point"] or (found["comma"] or "").replace(",", ".")))
        if found["exponent"] or found["ten"]:
            value *= _power(Fraction(10), int(found["exponent"] or found["ten"]))
        elif found["power"]:
            value = _power(value, int(found["power"]))
        elif found["under"]:
            value /= _fraction(found["under"])
        elif found["large"]:
            value *= _LARGE[found["large"].lower()]
        if not found["comma"] or found["by"]:
            return (sign * value,)
        return sign * value, sign * _fraction(digits), _fraction(found["comma"][1:])
    except (ZeroDivisionError, OverflowError):
        return ()


def _fraction(digits: str) -> Fraction:
    if len(digits) > LARGEST:
        raise OverflowError
    return Fraction(Decimal(digits))


def _power(base: Fraction, exponent: int) -> Fraction:
    size = max(abs(base.numerator).bit_length(), base.denominator.bit_length())
    if size * abs(exponent) > 4 * LARGEST:
        raise OverflowError
    return base**exponent
