"""Streams of token batches for the offline stages, from demonstrations, text files and the replay buffer.

A batch is a function of (seed, update): each of its rows first draws its source in proportion to the weights, then
takes the next row of that source. Demonstrations are drawn by index, so resuming skips them for free; text and rollouts
are read in passes, each pass in a new order, and resuming reads again up to where it was (their files must not change
within a run). All ranks walk the same global sequence and keep their own part of each batch. No file is ever held in
memory as a whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from configs.schema import DataSource
from latent_control.records import TokenBatch
from pipeline.data.sources import Encoder, TokenRow, heldout_rows, training_feed
from rollout_workers.tasks.protocol import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def training_batches(
    sources: Sequence[DataSource],
    *,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    chat: bool,
    batch_size: int,
    max_length: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
) -> Iterator[TokenBatch]:
    """Endless batches from update ``start`` on: rows ``rank * batch_size / world`` and following of each global batch.

    The rows of all ranks, one after the other, are those of ``world=1``; each rank pads to its own longest row.
    ``ValueError`` names file, row and remedy of what cannot be used, when it is reached.
    """
    share = _share(batch_size, rank, world)
    encoder = Encoder(tokenizer=tokenizer, chat=chat, max_length=max_length)
    feeds = [training_feed(source, task, encoder, seed=seed + 1 + i) for i, source in enumerate(sources)]
    weights = [source.weight for source in sources]
    for update in range(start):
        for index, count in enumerate(np.bincount(_draws(seed, update, weights, batch_size)[0], minlength=len(feeds))):
            feeds[index].skip(int(count))
    for update in itertools.count(start):
        rows = []
        for place, (index, draw) in enumerate(zip(*_draws(seed, update, weights, batch_size), strict=True)):
            if place in share:
                rows.append(feeds[index].take(float(draw)))
            else:
                feeds[index].skip(1)
        yield _batch(rows)


def repeated(batches: Iterator[TokenBatch], *, distinct: int, seed: int, start: int) -> Iterator[TokenBatch]:
    """The first ``distinct`` of ``batches`` (those of update 0 on) over and over, from update ``start`` on; in a new
    order in each pass after the first."""
    kept: list[TokenBatch] = []
    for update in itertools.count(start):
        turn, place = divmod(update, distinct)
        number = int(np.random.default_rng((seed, turn)).permutation(distinct)[place]) if turn else place
        while len(kept) <= number:
            kept.append(next(batches))
        yield kept[number]


def heldout_batches(
    sources: Sequence[DataSource],
    *,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    chat: bool,
    batch_size: int,
    max_length: int,
    seed: int,
    count: int,
) -> list[TokenBatch]:
    """Up to ``count`` held-out sequences, mixed like the training data, in batches of up to ``batch_size``;
    fewer when the sources hold out fewer, ``ValueError`` when there is none.
    """
    encoder = Encoder(tokenizer=tokenizer, chat=chat, max_length=max_length)
    streams = [heldout_rows(source, task, encoder, seed=seed + 1 + i) for i, source in enumerate(sources)]
    rows = _mixed(streams, [source.weight for source in sources], count, seed)
    if not rows:
        raise ValueError("the data holds out no sequence; use more data")
    return [_batch(rows[first : first + batch_size]) for first in range(0, len(rows), batch_size)]


def _mixed(streams: Sequence[Iterator[TokenRow]], weights: Sequence[float], count: int, seed: int) -> list[TokenRow]:
    """Rows drawn from the streams by weight until ``count`` are there or all streams have ended."""
    rng = np.random.default_rng([seed, 0])
    open_weights = np.asarray(weights, float)
    rows: list[TokenRow] = []
    while len(rows) < count and open_weights.any():
        index = int(rng.choice(len(streams), p=open_weights / open_weights.sum()))
        row = next(streams[index], None)
        if row is None:
            open_weights[index] = 0
        else:
            rows.append(row)
    return rows


def _draws(seed: int, update: int, weights: Sequence[float], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """For each row of an update's batch: the source it comes from, and a number in [0, 1)."""
    uniforms = np.random.default_rng([seed, 1, update]).random((rows, 2))
    edges = np.cumsum(weights) / np.sum(weights)
    return np.minimum(np.searchsorted(edges, uniforms[:, 0], side="right"), len(weights) - 1), uniforms[:, 1]


def _share(batch_size: int, rank: int, world: int) -> range:
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world}: ranks count from 0")
    if batch_size % world:
        raise ValueError(f"batch_size {batch_size} does not divide among {world} workers; use a multiple of {world}")
    own = batch_size // world
    return range(rank * own, (rank + 1) * own)


def _batch(rows: Sequence[TokenRow]) -> TokenBatch:
    longest = max(len(row.ids) for row in rows)
    ids = np.zeros((len(rows), longest), np.int64)  # padding is masked everywhere
    lengths, starts = np.array([len(row.ids) for row in rows]), np.array([row.start for row in rows])
    positions = np.arange(longest)
    real = positions < lengths[:, None]
    spoken = real & (positions >= starts[:, None])
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)] = row.ids
        if row.spoken is not None:
            spoken[place, : len(row.ids)] = row.spoken
    return TokenBatch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(real.astype(np.int64)),
        response_mask=torch.from_numpy(spoken),
    )
