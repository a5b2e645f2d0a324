"""SIGTERM and Ctrl-C end a run in order: the update at hand is finished, the state saved. A second signal ends it at
once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """The run was asked to end; who holds a state saves it on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Watch:
    """Signals belong to the whole process, and so does this."""

    def __init__(self) -> None:
        self.listening = False
        self.asked: int | None = None
        self.nothing_to_save = False

    def __call__(self, number: int, _: FrameType | None) -> None:
        second, self.asked = self.asked is not None, self.asked or number
        if second or self.nothing_to_save:
            raise Stopped(number)


_watch = _Watch()


@contextmanager
def listening() -> Iterator[None]:
    """For the length of a block a first signal only makes ``check`` raise. No-op outside of the main thread, and when
    nested."""
    if _watch.listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _watch.listening, _watch.asked = True, None
    listen_again()
    try:
        yield
    finally:
        _watch.listening = False
        for number, handler in before.items():
            signal.signal(number, handler)


def listen_again() -> None:
    """Install the handlers again after a library replaced them (``ray.init`` does); a signal that the process
    ignores stays ignored."""
    if _watch.listening and threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _watch)


def check() -> None:
    """Raise ``Stopped`` if a signal has come. Call it where the state is whole."""
    if _watch.listening and _watch.asked is not None and threading.current_thread() is threading.main_thread():
        raise Stopped(_watch.asked)


@contextmanager
def at_once() -> Iterator[None]:
    """A block in which there is nothing to save: the first signal ends it where it is."""
    check()
    before, _watch.nothing_to_save = _watch.nothing_to_save, True
    try:
        yield
    finally:
        _watch.nothing_to_save = before
