"""Work that takes turns in one thread: each piece goes on until it has to wait for something, then another one does.

The loop of a run is written as if it were alone; where it waits for rollouts it gives way. Only one piece works at a
time, and only where it says so do others come in between, so that nothing needs a lock and random streams of the
process stay those of the piece at work.
"""

from __future__ import annotations

from collections.abc import Callable

from greenlet import getcurrent, greenlet


class TakesTurns:
    """``piece = TakesTurns(work)``, then ``piece.go_on()`` until ``piece.ended``; it raises what ``work`` raises.
    ``work`` calls ``give_way`` where it waits."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._piece = greenlet(work)

    @property
    def ended(self) -> bool:
        """Whether the work is done, or gave up."""
        return bool(self._piece.dead)

    def go_on(self) -> None:
        """Let the work go on until it gives way or ends."""
        self._piece.switch()

    def abort(self, error: BaseException) -> None:
        """Raise ``error`` where the work waits; what comes out of the work is raised here."""
        self._piece.throw(error)


def give_way() -> None:
    """Called by work that waits: the others go on."""
    parent = getcurrent().parent
    assert parent is not None, "only work of a TakesTurns gives way"
    parent.switch()
