"""Text of a model, a file or a user without anything that moves a cursor, hides letters or turns them round."""

from __future__ import annotations

import re

UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
"""Controls but tab and line feed, and what turns or hides letters: a text must not look like another one."""


def escaped(text: str) -> str:
    """What a terminal may be given: ``\\x1b[2J`` as it is written here. Lines stay lines."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)
