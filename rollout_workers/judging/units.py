r"""Quantities that answers end with: ``5 km``, ``60 miles per hour``, ``6\pi \text{ cm}^2``, ``\$5``, ``7 people``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from rollout_workers.judging.numerals import close, last_written, number_of

LONGEST = 300
"""Characters at the end of an answer that are looked at."""
_PREFIXES = {"k": "kilo", "c": "centi", "m": "milli", "d": "deci", "u": "micro", "\u03bc": "micro", "n": "nano"}
_PREFIXES |= {"M": "mega", "G": "giga"}
_SIZES = {"kilo": 3, "mega": 6, "giga": 9, "deci": -1, "centi": -2, "milli": -3, "micro": -6, "nano": -9}
_METRIC = """
m=meter=metre length 1; g=gram=gramme mass 1/1000; L=l=liter=litre length^3 1/1000; s=second time 1; J=joule energy 1
W=watt power 1; N=newton force 1; V=volt voltage 1; A=ampere current 1; Pa=pascal pressure 1; Hz=hertz frequency 1
B=byte data 1; mol=mole amount 1
"""
_OTHERS = """
sec time 1; min=minute time 60; h=hr=hour time 3600; day time 86400; week time 604800; month month 1; yr=year year 1
in=inch=inches length 0.0254; ft=foot=feet length 0.3048; yd=yard length 0.9144; mi=mile length 1609.344; amp current 1
ha=hectare length^2 10000; acre length^2 4046.8564224; tonne mass 1000; ton ton 1; lb=pound=£ pound 1
oz=ounce pound 1/16
gal=gallon gallon 1; qt=quart gallon 1/4; pt=pint gallon 1/8; cup gallon 1/16; K=kelvin kelvin 1; rad=radian radian 1
degC=celsius celsius 1; degF=fahrenheit fahrenheit 1; bit data 1/8; °=degree=deg degree 1
$=USD=dollar dollar 1; ¢=cent dollar 1/100; €=EUR=euro euro 1; ¥=JPY=yen yen 1; ₹=INR=rupee rupee 1; %=percent percent 1
"""
_SQUARES = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_STYLED = re.compile(r"\\(?:text|textrm|textbf|mathrm|mbox|operatorname)\s?\{([^{}]*)\}|\\[,;: ]|~")
_DEGREES = re.compile(r"(?:°|\^ ?\{? ?\\circ ?\}?|\bdeg(?:rees?)?\b) ?(?:([CF])(?:elsius|ahrenheit)?\b)?")
_POWER = r"(?:\^\{?(?P<power>-?[1-9])\}?)?"
_NAME = "[^\\W\\d_]++|[%\u00a3\u20ac\u00a5\u20b9\u00a2]"
_UNIT = re.compile(
    rf"(?P<by>(?:/|per\b|\*|\\cdot) ?)?(?:(?P<raised>square|cubic|sq|cu)\.? )?(?P<name>{_NAME}){_POWER}\.? ?"
)
_TAIL = re.compile(
    rf"(?:(?<=[0-9.)}}])|(?<=\\pi)) ?(?P<tail>(?:{_NAME})(?:\^\{{?-?[1-9]\}}?|\\cdot|{_NAME}|[ /*.,])*+)$"
)
_WORD = re.compile(r"(?:(?:square|cubic) )?[^\W\d_]{3,}")
_PAID = re.compile("(?:^|(?<= ))\\\\?(?P<unit>[$\u00a3\u20ac\u00a5\u20b9]) ?(?P<value>[-+]?[0-9][^$]*+)$")

_PART = rf"(?:[0-9]{{1,12}}(?:\.[0-9]{{1,12}})?) ?(?:{_NAME})"
_PARTS = re.compile(_PART.replace("(?:", "(", 1).replace(" ?(?:", " ?("))
_SUM = re.compile(rf"(?<![\w.,/*^+-]){_PART}(?:\.?,? (?:and )?{_PART}){{1,3}}(?![\w/^])")
"""``4 hours and 30 minutes``, ``5 ft 2 in``: larger units first."""
_FOLLOWING = re.compile(
    r" ?(?!in [^\W\d_])(?:(?:square|cubic|sq|cu)\.? )?[^\s\d,;:.()=*^{}]+(?:\^\{?-?[1-9]\}?)?"
    r"(?:(?: per |/)[^\W\d_]+)?(?![\w^])"
)
"""The unit behind a number within a sentence: one word, ``miles per hour``; not ``in all``."""


@dataclass(frozen=True, slots=True)
class Unit:
    """``Unit(kind=(("length", 1), ("time", -1)), size=Fraction(5, 18))`` of km/h; no ``kind``: mere words."""

    kind: tuple[tuple[str, int], ...] = ()
    size: Fraction = Fraction(1)


def same(gold: str, found: str) -> bool | None:
    """Whether the quantities at the end of two answers are equal; ``None`` where they do not decide it.

    Values are converted between units of one kind. A unit on one side alone is no difference; ``5 %`` is 0.05 and 5.
    """
    (one, mine), (two, theirs) = quantity(gold), quantity(found)
    if mine is None and theirs is None:
        return None
    if mine and theirs and mine.kind != theirs.kind:
        return False if mine.kind and theirs.kind else None
    if one is None or two is None:
        return False if mine and theirs and mine.size != theirs.size else None
    if mine and theirs:
        return close(one * mine.size, two * theirs.size) if mine.kind else None
    shares = [value / 100 if unit == PERCENT else value for value, unit in ((one, mine), (two, theirs))]
    return close(one, two) or close(*shares)


def last_quantity(text: str) -> str:
    """The last number of a text with the unit behind it: ``"5 km"`` of ``"It is 5 km, or so."``"""
    text = re.sub(" ++", " ", _DEGREES.sub(r" deg\1 ", _STYLED.sub(r" \1 ", text)))
    value, rest = last_written(text)
    for parts in _SUM.finditer(text):
        if not last_written(text[parts.end() :])[0] and _sum(parts[0]):  # the last number is in it
            return parts[0]
    unit = _FOLLOWING.match(rest) if len(value) < LONGEST / 2 else None
    return value + (unit[0] if unit else "")


def quantity(text: str) -> tuple[Fraction | None, Unit | None]:
    """Value and unit; ``None`` for what is not there or cannot be read."""
    text = _STYLED.sub(r" \1 ", text[-LONGEST:]).replace("\\%", "%")
    text = re.sub(" ++(?=[\\^.])", "", " ".join(_DEGREES.sub(r" deg\1 ", text).split())).removesuffix(".")
    text = text.rpartition("=")[2].strip()
    for parts in _SUM.finditer(text):
        if parts.end() == len(text) and (found := _sum(parts[0])):
            return found
    if paid := _PAID.search(text):
        return _value(text[: paid.start()] + paid["value"]), _UNITS[paid["unit"]]
    tail = _TAIL.search(text)
    unit = _unit(tail["tail"], apart=tail[0] != tail["tail"]) if tail else None
    return _value(text[: tail.start()] if tail and unit else text), unit


def _sum(text: str) -> tuple[Fraction, Unit] | None:
    """What parts of one kind add up to, in the first one's unit; ``None`` where they are none."""
    parts = [(Fraction(value), _UNITS.get(name) or _NAMES.get(name.casefold())) for value, name in _PARTS.findall(text)]
    known = [(value, unit) for value, unit in parts if unit is not None and unit.kind]
    if len(known) < len(parts) or any(a.kind != b.kind or a.size <= b.size for (_, a), (_, b) in pairwise(known)):
        return None
    first = known[0][1]
    return sum((value * unit.size for value, unit in known), Fraction()) / first.size, first


def _value(text: str) -> Fraction | None:
    """The number that a text is, or ends with behind words that have none."""
    words, _, last = text.rpartition(" ")
    said = words and re.search("[A-Za-z:=]$", words) and not re.search(r"[0-9\\]", words)
    return number_of(last if said else text)


def _unit(tail: str, *, apart: bool) -> Unit | None:
    """The unit that a tail begins with; a word that is none (``people``); a letter behind a digit is a variable."""
    kinds: Counter[str] = Counter()
    size, place = Fraction(1), 0
    while found := _UNIT.match(tail, place):
        name = found["name"]
        known = _UNITS.get(name) or _NAMES.get(name.casefold())
        product = found["by"] or (name in _UNITS and len(name) < 4 and name != "in")  # 5 N m, but 5 m in all
        if known is None or (place and not product) or (len(name) == 1 and name.isalpha() and not apart):
            break
        power = int(found["power"] or 1) * _SQUARES.get(found["raised"], 1)
        power = -power if (found["by"] or "").startswith(("/", "per")) else power
        kinds.update({kind: power * each for kind, each in known.kind})
        size, place = size * known.size**power, found.end()
    if place:
        return Unit(tuple(sorted(kinds.items())), size)
    return Unit() if apart and _WORD.fullmatch(tail) and number_of(f"1 {tail}") is None else None


def _table(rows: str, prefixes: Mapping[str, str]) -> Iterator[tuple[str, Unit]]:
    for names, kind, size in (row.split() for row in re.split("[;\n]", rows.strip())):
        base, _, power = kind.partition("^")
        for name in names.split("="):
            yield name, Unit(((base, int(power or 1)),), Fraction(size))
            for short, long in prefixes.items():
                larger = Fraction(size) * Fraction(10) ** _SIZES[long]
                yield (short if len(name) < 4 else long) + name, Unit(((base, int(power or 1)),), larger)


_UNITS = dict([*_table(_METRIC, _PREFIXES), *_table(_OTHERS, {})])
"""By symbol, whose case counts, and by name."""
_NAMES = {name.casefold() + plural: unit for name, unit in _UNITS.items() if len(name) > 1 for plural in ("", "s")}
_SPEEDS = {"mph": "mi", "kph": "km", "kmh": "km"}
_NAMES |= {name: Unit((("length", 1), ("time", -1)), _UNITS[way].size / 3600) for name, way in _SPEEDS.items()}
PERCENT = _UNITS["%"]
