"""Judges each response in a fork of its own, behind walls: for verifiers that are not ours and may evaluate what they
are given."""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakValueDictionary

from rollout_workers.judging.typed import encode
from rollout_workers.tasks.child import LOADING_SECONDS, Child, Ended, readable
from rollout_workers.tasks.protocol import Failure

KINDS = ("verifier_error", "verifier_refused", "reward_error", "reward_memory")
"""Failures that a fork may say of itself; of its end the parent knows better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Confinement:
    """Which judge, and its limits: ``Confinement(module="rollout_workers.judging.gym", seconds=5.0,
    megabytes=2048)``."""

    module: str
    seconds: float
    """For one response: of the clock, and of CPU."""
    megabytes: int
    """Of address space, for each fork."""
    parallel: int | None = None
    """Forks at once; ``None``: as many as there are CPUs for this process."""
    unconfined: bool = False
    """Judge even where the walls do not stand."""


class Forks:
    """The worker's end; the parent of the forks starts with the first batch and ends with this object. Take it from
    ``forks``."""

    def __init__(self, confinement: Confinement) -> None:
        self.confinement = confinement
        self._child: Child | None = None
        self._lock = threading.Lock()

    def call(
        self, judge: Mapping[str, object], rows: Sequence[object], responses: Sequence[str], *, name: str
    ) -> list[float | Failure]:
        """The verdict of the judge made from ``judge`` on each pair; equal pairs are judged once. ``name`` is for
        errors.

        Raises:
            ValueError: the judge cannot be made, or the walls do not stand here.
        """
        places: dict[int, int] = {}
        for row in rows:
            places.setdefault(id(row), len(places))
        distinct = {places[id(row)]: row for row in rows}
        pairs = [(places[id(row)], text) for row, text in zip(rows, responses, strict=True)]
        asked = list(dict.fromkeys(pairs))
        sent = [encode(row) for row in distinct.values()]
        with self._lock:
            found = dict(zip(asked, self._judged(encode(judge), sent, asked, name), strict=True))
        return [found[pair] for pair in pairs]

    def close(self) -> None:
        """End the parent and its forks."""
        if self._child is not None:
            self._child.end()
            self._child = None

    def _judged(
        self, judge: object, rows: list[object], asked: list[tuple[int, str]], name: str
    ) -> list[float | Failure]:
        found: dict[int, float | Failure] = {}
        if not asked:
            return []
        if self._child is None:
            c = self.confinement
            settings = {key: value for key, value in asdict(c).items() if value is not None}
            self._child = Child("zygote", {"parallel": cpus(), **settings})
        batch = secrets.token_hex(8)
        try:
            self._child.send({"id": batch, "judge": judge, "rows": rows, "asked": asked})
            seconds = LOADING_SECONDS + self.confinement.seconds  # the first answer may wait for imports
            while len(found) < len(asked):
                said = json.loads(self._child.line(seconds))
                if said["id"] != batch:
                    continue  # of a batch that was broken off here
                self._require_judge(said, name)
                found |= zip(said["places"], self._verdicts(said), strict=True)
                seconds = 2 * self.confinement.seconds + 10
        except Ended as ended:
            self.close()
            lost = Failure(kind=ended.args[0], message=ended.args[1])
            found = {place: found.get(place, lost) for place in range(len(asked))}
        return [found[place] for place in range(len(asked))]

    def _require_judge(self, said: Mapping[str, Any], name: str) -> None:
        if "broken" in said:
            raise ValueError(f"the verifier of {name} does not load: {readable(said['broken'])}")
        if "unconfined" in said:
            self.close()
            raise ValueError(
                f"{name} evaluates what the model writes, and its isolation does not stand here: no filter of "
                f"{said['unconfined']}. On Linux install libseccomp (apt-get install libseccomp2); see `latent-control "
                "doctor` and SECURITY.md. To run it without, on a machine where the model's code may do anything, set "
                "task.options.limits.allow_unconfined: true"
            )

    def _verdicts(self, said: Mapping[str, Any]) -> list[float | Failure]:
        return [self._end_of(said["ended"])] if "ended" in said else [_verdict(text) for text in said["said"]]

    def _end_of(self, why: str) -> Failure:
        if why == "timeout":
            return Failure(
                kind="reward_timeout",
                message=f"no answer within {self.confinement.seconds:g} s; raise task.options.limits.seconds",
            )
        if why == "refused":
            return Failure(kind="verifier_refused", message="the answer made a system call that judging has no use for")
        return Failure(kind="reward_crash", message=f"the process ended with {why} (out of memory, or it ended itself)")


def _verdict(said: str) -> float | Failure:
    """What a fork said, which may be anything: a number as ``float.hex`` writes it, or a failure as JSON."""
    try:
        if said[:1] != "{":
            return float.fromhex(said)
        told = json.loads(said)
        if told.keys() == {"failure", "message"} and told["failure"] in KINDS:
            return Failure(kind=told["failure"], message=readable(str(told["message"])))
    except (ValueError, TypeError, OverflowError, RecursionError):
        pass
    return Failure(kind="reward_channel", message=f"the fork answered {readable(said[:80])!r}, which is not a verdict")


_forks: WeakValueDictionary[Confinement, Forks] = WeakValueDictionary()


def forks(confinement: Confinement) -> Forks:
    """The one that all tasks of this process share which ask for the same."""
    found = _forks.get(confinement)
    if found is None:
        found = _forks[confinement] = Forks(confinement)
    return found


def cpus() -> int:
    """CPUs that this process may use."""
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
