"""Which finished requests an update may train on, so that none is ever staler than allowed: pure decisions, no clock,
no Ray.

A request is stamped with the policy version a worker gets it with. Stamp s may be trained on by update s +
max_staleness at the latest (updates count from 0; update u trains version u). An update takes the finished requests
that are due first, but only when those it leaves can still be taken in time, ``per_update`` by ``per_update``. At most
(max_staleness + 1) x per_update requests are open, so some choice always exists once the oldest have finished.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

Stamps = Mapping[int, int | None]
"""Open requests: request id -> policy version it was handed out with, ``None`` while it waits for a worker."""


def room(stamps: Stamps, *, per_update: int, max_staleness: int) -> int:
    """Requests that may be opened now; not positive when too many are open already."""
    return (max_staleness + 1) * per_update - len(stamps)


def next_batch(
    stamps: Stamps, finished: Collection[int], *, version: int, per_update: int, max_staleness: int | None
) -> list[int] | None:
    """The ``per_update`` finished requests that update ``version`` trains on, in the order of their ids; ``None``:
    wait.

    ``max_staleness=None`` does not look at what is left: an update never waits for a straggler.
    """
    stamp = {request: version if given is None else given for request, given in stamps.items()}
    first = sorted(finished, key=lambda request: (stamp[request], request))[:per_update]
    if len(first) < per_update:
        return None
    if max_staleness is not None:
        left = sorted(stamp[request] for request in stamps.keys() - set(first))
        if any(oldest + max_staleness < version + 1 + place // per_update for place, oldest in enumerate(left)):
            return None
    return sorted(first)


def expired(stamps: Stamps, finished: Collection[int], *, version: int, max_staleness: int) -> list[int]:
    """Finished requests that are too stale for update ``version``."""
    return sorted(request for request in finished if (stamps[request] or 0) + max_staleness < version)
