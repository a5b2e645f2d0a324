"""Tools of the tests, the good and the bad."""

from __future__ import annotations

import os
import socket
import time
from typing import Literal


def calculate(left: int, sign: Literal["+", "-", "*"], right: int) -> int:
    """Calculate with two whole numbers."""
    return {"+": left + right, "-": left - right, "*": left * right}[sign]


def look_up(word: str, languages: list[str] | None = None) -> dict[str, object]:
    """Look a word up."""
    return {"word": word, "languages": languages or ["en"]}


def hang() -> str:
    """Never answer."""
    time.sleep(60)
    return ""


def leave() -> str:
    """End the process."""
    os._exit(3)


def dial() -> str:
    """Open a connection."""
    socket.create_connection(("127.0.0.1", 9))
    return ""


def long() -> str:
    """More than anybody reads."""
    return "x" * 10**6


def bare(left, right: int):
    """Without a type hint."""
