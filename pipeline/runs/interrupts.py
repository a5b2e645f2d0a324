"""SIGTERM, SIGHUP and Ctrl-C end a program in order: the update at hand is finished, the state saved. A second signal,
or ``PATIENCE``, ends it where it is; what hangs even then is left behind after ``LIMIT``."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PATIENCE, LIMIT = 4.5, 7.0
"""Seconds from the signal: until an update at hand is abandoned, and until the process ends whatever it is at.
Schedulers kill after 10 to 30 s; on a busy machine ending takes 3 s more than ``LIMIT``."""


class Stopped(KeyboardInterrupt):
    """The program was asked to end; who holds a state that is ``whole`` saves it on the way out."""

    def __init__(self, number: int, *, whole: bool = False) -> None:
        super().__init__(signal.Signals(number).name)
        self.number, self.whole = number, whole


class _Watch:
    """Signals belong to the whole process, and so does this."""

    def __init__(self) -> None:
        self.handled: tuple[signal.Signals, ...] = ()
        self.bell: socket.socket | None = None
        self.timed = False
        """Whether a signal has come, and the time runs."""
        self.listening = False
        self.replaced = False
        """Whether a library may have put its own handlers in the place of this one."""
        self.asked: int | None = None
        self.saved = False
        """Whether the work that the signal ends goes on later."""
        self.nothing_to_save = True
        self.whole_program = False
        self.last_words: Callable[[str], None] = lambda name: None

    def __call__(self, number: int, _: FrameType | None) -> None:
        second, self.asked = self.asked is not None, self.asked or number
        self.start_timers(number)
        if second or self.nothing_to_save:
            raise Stopped(self.asked)

    def start_timers(self, number: int) -> None:
        """Once."""
        if not self.timed:
            self.timed, self.saved = True, self.listening
            _later(PATIENCE, partial(self._again, number))
            _later(LIMIT, partial(self._leave, number))

    def look(self) -> None:
        """See signals as they come: Python calls its handlers in the main thread only, once that is out of whatever C
        code it waits in (``ray.get`` took 30 s)."""
        if self.bell is None:
            self.bell, other = socket.socketpair()
            for end in (self.bell, other):
                end.setblocking(False)
            threading.Thread(target=self._watch, args=(other,), daemon=True).start()
        signal.set_wakeup_fd(self.bell.fileno(), warn_on_full_buffer=False)

    def _watch(self, bell: socket.socket) -> None:
        while True:
            select.select([bell], [], [])
            for number in bell.recv(64):
                by = signal.getsignal(number)  # somebody else may handle it for now
                if number in self.handled and (by is self or (self.replaced and by is not signal.SIG_IGN)):
                    self.start_timers(number)

    def _again(self, number: int) -> None:
        """As if the signal came a second time, in the main thread."""
        if self.timed and self.listening and not self.nothing_to_save:
            signal.pthread_kill(threading.main_thread().ident or 0, number)

    def _leave(self, number: int) -> None:
        if not self.timed:
            return
        with suppress(Exception):  # the process ends, whether or not it could say so
            self.last_words(signal.Signals(number).name)
        _exit(exit_code(number, saved=self.saved))


def _exit(code: int) -> None:
    """End now, with every process that this one started."""
    with suppress(Exception):  # even where memory or files have run out, this process ends
        import psutil

        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
    os._exit(code)


def _later(seconds: float, work: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, work)
    timer.daemon = True
    timer.start()


_watch = _Watch()


def exit_code(number: int, *, saved: bool) -> int:
    """Of a process that a signal ended: 0 after SIGTERM where the work goes on later, else a shell's own."""
    return 0 if saved and number == signal.SIGTERM else 128 + number


def end_on_signals() -> None:
    """For a whole program: SIGTERM and SIGHUP raise ``Stopped``, so that what was started is ended, too."""
    _watch.handled, _watch.whole_program = (signal.SIGTERM, signal.SIGHUP), True
    listen_again()


def leave(code: int) -> None:
    """The end of a program that a signal ended: without the exit of its libraries, which took 30 s more."""
    if _watch.timed:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        _exit(code)


@contextmanager
def listening(last_words: Callable[[str], None] = lambda name: None) -> Iterator[None]:
    """For the length of a block a first signal only makes ``check`` raise. No-op outside of the main thread, and when
    nested.

    Args:
        last_words: called with the signal's name where the block cannot be ended in order.
    """
    if _watch.listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    handled, _watch.handled = _watch.handled, SIGNALS
    _watch.listening, _watch.nothing_to_save, _watch.last_words = True, False, last_words
    _watch.asked, _watch.timed = None, False
    listen_again()
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if _watch.asked is None or isinstance(interrupt, Stopped):
            raise
        raise Stopped(_watch.asked) from interrupt  # Ray replaces what a handler raises by an error without a name
    finally:
        _watch.handled, _watch.listening, _watch.nothing_to_save = handled, False, True
        if not _watch.whole_program:  # somebody's own program goes on after this
            _watch.asked, _watch.timed = None, False
        for number, handler in before.items():
            signal.signal(number, handler)


def listen_again() -> None:
    """Install the handlers again after a library replaced them (``ray.init`` does); a signal that the process
    ignores stays ignored."""
    if threading.current_thread() is threading.main_thread() and _watch.handled:
        _watch.look()
        for number in _watch.handled:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _watch)


@contextmanager
def through_replacement() -> Iterator[None]:
    """A block in which a library replaces the handlers (``ray.init``, for a minute on a busy machine): a signal is
    heard all the same, and what the library's own handler raises is ``Stopped``."""
    _watch.replaced = True
    try:
        yield
    except SystemExit as end:
        if isinstance(end.code, int) and end.code in _watch.handled:
            raise Stopped(end.code) from end
        raise
    finally:
        _watch.replaced = False
        listen_again()


def check() -> None:
    """Raise ``Stopped`` if a signal has come. Call it where the state is whole."""
    if _watch.listening and _watch.asked is not None and threading.current_thread() is threading.main_thread():
        raise Stopped(_watch.asked, whole=True)


@contextmanager
def at_once() -> Iterator[None]:
    """A block in which there is nothing to save: the first signal ends it where it is."""
    check()
    before, _watch.nothing_to_save = _watch.nothing_to_save, True
    try:
        yield
    finally:
        _watch.nothing_to_save = before


def say_last(text: str) -> None:
    """A line to stderr from a process that is about to be left."""
    with suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
