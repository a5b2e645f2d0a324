"""What can become of a file or of a checkpoint folder: shared by ``corruption.py`` and its peers. The standard library
only."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def torn(path: Path) -> None:
    """The tail is lost."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def zeroed(path: Path) -> None:
    """The middle third is zeros, as after a power failure."""
    size = path.stat().st_size
    data = bytearray(path.read_bytes())
    data[size // 3 : 2 * size // 3] = bytes(2 * size // 3 - size // 3)
    path.write_bytes(data)


def emptied(path: Path) -> None:
    """Made, and never written."""
    path.write_bytes(b"")


def gone(path: Path) -> None:
    """Deleted, or never made."""
    path.unlink()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "torn": torn,
    "flipped bit": flipped,
    "zeroed": zeroed,
    "emptied": emptied,
    "gone": gone,
}
EMPTY_FOLDER, HALF_FOLDER = "empty newer folder", "newer folder, half written"


def half(newest: Path, newer: Path) -> None:
    """``newer`` gets every other file of ``newest``: its making was interrupted."""
    newer.mkdir()
    for path in sorted(path for path in newest.rglob("*") if path.is_file())[::2]:
        to = newer / path.relative_to(newest)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(path.read_bytes())


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextmanager
def heard(*loggers: str) -> Iterator[list[str]]:
    """What is warned of in a block, by ``warnings`` or by these loggers."""
    handler = _Heard()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in loggers:
            logging.getLogger(name).addHandler(handler)
        try:
            yield handler.texts
        finally:
            for name in loggers:
                logging.getLogger(name).removeHandler(handler)
            handler.texts += [str(one.message) for one in caught]


def tried(case: tuple[str, str], resume: Callable[[], bool], usual: set[str], *loggers: str) -> dict[str, Any]:
    """A row on one case. ``resume()`` goes on and says whether the state is the undamaged one's; what it warned of
    beyond ``usual``, or raised, is what was found."""
    error, same = "", False
    with heard(*loggers) as said:
        try:  # whatever a peer makes of damage is its answer
            same = resume()
        except Exception as raised:  # noqa: BLE001
            error = f"{type(raised).__name__}: {str(raised).strip().partition(chr(10))[0][:160]}"
    words = [text[:160] for text in said if text not in usual]
    return {
        "artifact": case[0],
        "damage": case[1],
        "error": error,
        "said": words[:3],
        "same": same,
        "outcome": outcome(error, words, same),
    }


def outcome(error: str, said: list[str], same: bool) -> str:
    """In a word."""
    if error:
        return "found, stopped"
    if same:
        return "found, fell back" if said else "no effect"
    return "found, went on otherwise" if said else "silent"
