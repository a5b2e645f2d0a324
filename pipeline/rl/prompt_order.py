"""Which prompts a run trains on, in which order: a function of the seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

# Larger (generated) prompt sets are not permuted: their order means nothing.
LARGEST_PERMUTED = 1_000_000


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


@lru_cache(maxsize=64)
def prompt_indices(update: int, count: int, *, size: int, seed: int) -> tuple[int, ...]:
    """The ``count`` prompts of ``update`` out of ``size``, all different: each at most once per pass, in a new order
    each pass.

    A pass has ``size // count`` updates; the few prompts left over in one come in another.

    Raises:
        ValueError: there are fewer than ``count`` prompts.
    """
    if count > size:
        raise ValueError(
            f"improve.prompts_per_update is {count}, but the task has only {size} training prompts: set "
            f"it to {size} or fewer"
        )
    epoch, place = divmod(update, size // count)
    numbers = range(place * count, (place + 1) * count)
    if size > LARGEST_PERMUTED:
        return tuple(numbers)
    return tuple(_permutation(seed, epoch, size)[numbers.start : numbers.stop].tolist())


def prompt_at(position: int, count: int, *, size: int, seed: int) -> tuple[int, int]:
    """(update, prompt) at a position of the run's stream of prompts, ``count`` of which belong to each update in
    turn."""
    update, place = divmod(position, count)
    return update, prompt_indices(update, count, size=size, seed=seed)[place]


def chunks(items: Sequence[int], parts: int) -> list[tuple[int, ...]]:
    """``items`` in at most ``parts`` consecutive, nearly equal pieces, none empty."""
    bounds = np.linspace(0, len(items), min(parts, len(items)) + 1).round().astype(int)
    return [tuple(items[a:b]) for a, b in pairwise(bounds)]


def chunk_count(prompts: int, workers: int, learners: int) -> int:
    """Requests per update: at least one per worker, and a multiple of the learners, among which whole answers are
    shared out."""
    learners = max(1, learners)
    wanted = max(1, workers, learners)
    return max(learners, min(-(-wanted // learners) * learners, prompts // learners * learners))


def equal_chunk_count(prompts: int, workers: int, learners: int) -> int:
    """``chunk_count`` when all pieces must be of one size, for updates that take any of them."""
    learners = max(1, learners)
    wanted = min(max(1, workers, learners), prompts)
    return next(parts for parts in range(wanted, prompts + 1) if prompts % parts == 0 and parts % learners == 0)
