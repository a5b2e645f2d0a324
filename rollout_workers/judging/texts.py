"""Texts as a person reads them: one form of what Unicode, typography and LaTeX write in several ways."""

from __future__ import annotations

import re
import unicodedata
from functools import partial

LONGEST = 20_000
"""Characters of a response that are read, the last ones: the answer stands at the end."""
_MARKS = 8
"""Combining marks on one character, at most; more is no writing, and putting them in order takes squared time."""
_SAME = dict(
    [(c, "'") for c in "\u00b4\u02bb\u02bc\u2018\u2019\u201a\u201b\u2032\u2039\u203a"]
    + [(c, '"') for c in "\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb"]
    + [(c, "-") for c in "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"]
    + [("\u066b", "."), ("\u066c", ","), ("\u2044", "/"), ("\u2215", "/")]
)
_NO_WIDTH = set(
    map(chr, (0x034F, 0x115F, 0x1160, 0x20E3, 0x3164, 0xFFA0, *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)))
)
"""Beside Unicode's format characters: joiners, fillers, selectors of a variant (of an emoji, of a Han character)."""
_SPACELESS = (
    "\u0e00-\u0fff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u19e0-\u19ff\u1a20-\u1aad\u1b00-\u1b7f\u3005-\u3007"
    "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua980-\ua9df\uac00-\ud7ff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
"""Thai, Lao, Tibetan, Burmese, Khmer, Javanese, kana, Han; and Hangul, whose particles follow without a space."""
_JOINED = re.compile(rf"[^\W{_SPACELESS}]")
_POWERS = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u207e]+")
_INDICES = re.compile("[\u2080-\u208e]+")
_BRACES = re.compile(r"(?P<box>\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s{0,9}\{?)|\\.|[{}]", re.DOTALL)
_UNBRACED = re.compile(r"\$|\\[)\]]|\n|[,;:]?\s(?=[^\W\d_]{2})")


class _Characters(dict[int, str]):
    """For ``str.translate``: digits of every script as 0 to 9, wide and compatible forms as the plain ones, what has no
    width as nothing."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        digit = unicodedata.decimal(char, None)
        if char in _SAME:
            self[code] = _SAME[char]
        elif digit is not None:
            self[code] = str(digit)
        elif unicodedata.category(char) in ("Cf", "Cs") or char in _NO_WIDTH:
            self[code] = ""
        else:
            self[code] = "".join(_SAME.get(c, c) for c in unicodedata.normalize("NFKC", char))
        return self[code]


_characters = _Characters()


def plain(text: str) -> str:
    """The text in one form: ``x² = ４٢`` is ``x^2 = 42``, ``2½`` is ``2 1/2``, ``−7`` is ``-7``; case stays."""
    if text.isascii():
        return text
    text = re.sub("(?<=\\d)(?=[\u00bc-\u00be\u2150-\u215e])", " ", text)
    for runs, sign in ((_POWERS, "^"), (_INDICES, "_")):
        text = runs.sub(partial(_raised, sign), text)
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", _bounded(text)).translate(_characters))


def _raised(sign: str, run: re.Match[str]) -> str:
    shown = unicodedata.normalize("NFKC", run[0]).translate(_characters)
    return sign + (shown if len(shown) == 1 else f"{{{shown}}}")


def _bounded(text: str) -> str:
    kept, marks = [], 0
    for char in text:
        marks = marks + 1 if unicodedata.combining(char) else 0
        if marks <= _MARKS:
            kept.append(char)
    return "".join(kept)


def folded(text: str) -> str:
    """The plain text without case, its blanks single: what ``exact`` and ``contains`` compare."""
    return " ".join(plain(plain(text).casefold().replace("i\u0307", "i")).split())  # of the Turkish capital


def joined(left: str, right: str) -> bool:
    """Whether two neighbours are of one word: letters or digits of a script that parts words by blanks, or a character
    and its mark."""
    if not left or not right:
        return False
    if unicodedata.category(right)[0] == "M":
        return True
    return bool(_JOINED.match(right)) and bool(_JOINED.match(left) or unicodedata.category(left)[0] == "M")


def said(text: str) -> str:
    """What a text says after its thoughts (``</think>``) and, where it marks it, as its answer (``<answer>``)."""
    for before, after in (("</think>", "<think>"), ("<answer>", "</answer>")):
        text = text.rpartition(before)[2].partition(after)[0].strip() or text
    return text


def last_box(text: str) -> str | None:
    r"""What the last whole ``\boxed{...}``, ``\fbox{...}`` or ``\boxed 2`` holds, whose braces may nest.

    Without a brace it ends with the formula or the line, as in MATH's own reader, or before a word.
    """
    opened: list[tuple[int, bool]] = []
    last, end = -1, None
    for found in _BRACES.finditer(text):
        if found[0] == "}":
            start, boxed = opened.pop() if opened else (-1, False)
            if boxed and start > last:
                last, end = start, found.start()
        elif found[0][-1] == "{" and found[0] != r"\{":
            opened.append((found.end(), bool(found["box"])))
        elif found["box"]:
            last, end = found.end(), None
    if last < 0:
        return None
    return _UNBRACED.split(text[last:], maxsplit=1)[0].strip().removesuffix(".") if end is None else text[last:end]
