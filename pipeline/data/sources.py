"""Rows of the offline stages' data sources: demonstrations, text files and replay buffers.

Held out: the task's own held-out split; about one window in 32 of a text; about one prompt in 32 of a replay buffer.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from configs.schema import DataSource
from latent_control.text import end_token, end_tokens, whole_characters
from pipeline.data.text_files import read_texts, text_files
from pipeline.replay.reader import ReplayReader
from rollout_workers.tasks import build_task
from rollout_workers.tasks.encoding import decode_response, encode_demonstration, encode_episode
from rollout_workers.tasks.protocol import Demonstration, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELDOUT_EVERY = 32
SHUFFLE_WINDOWS = 1024
"""Text windows in memory from which the next one is drawn."""
_TEXTS_AT_ONCE = 32
_LOG = logging.getLogger(__name__)


class TokenRow(NamedTuple):
    """One sequence: its token ids, where the response starts (0: all of it counts), and, with several turns, which ids
    are responses."""

    ids: Sequence[int]
    start: int
    spoken: Sequence[bool] | None = None


class Feed(Protocol):
    """One source's endless training rows."""

    def take(self, draw: float) -> TokenRow:
        """The next row; sources that are drawn by index use ``draw`` in [0, 1) instead of their own order."""
        ...

    def skip(self, rows: int) -> None:
        """Skip the next ``rows`` rows."""
        ...


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Encodes texts as rows of at most ``max_length`` tokens."""

    tokenizer: PreTrainedTokenizerBase
    chat: bool
    max_length: int

    def demonstration(self, demo: Demonstration) -> TokenRow:
        """Prompt, response and end token (and further turns), cut to ``max_length``."""
        place = f"demonstration {demo.prompt.id}"
        if demo.later:
            ids, spoken = encode_episode(self.tokenizer, demo, chat=self.chat)
            return self.cut(ids, spoken.index(True), place, spoken)
        ids, start = encode_demonstration(self.tokenizer, demo, chat=self.chat)
        return self.cut(ids, start, place)

    def cut(self, ids: Sequence[int], start: int, place: str, spoken: Sequence[bool] | None = None) -> TokenRow:
        """The first ``max_length`` tokens; ``ValueError`` when they hold nothing of the response."""
        if start >= self.max_length:
            raise ValueError(
                f"{place}: its prompt has {start} tokens and max_length is {self.max_length}, so nothing of its "
                f"response is left to train on; set the stage's max_length to more than {start}"
            )
        return TokenRow(ids[: self.max_length], start, None if spoken is None else spoken[: self.max_length])

    def windows(self, texts: Sequence[str]) -> Iterator[TokenRow]:
        """Texts, each with the end token, in pieces of ``max_length``.

        Left out: blank texts, and pieces of one token, in which nothing is predicted.
        """
        end = [end_token(self.tokenizer, chat=False)] if end_tokens(self.tokenizer) else []
        filled = [text for text in texts if text.strip()]
        for ids in self.tokenizer(filled, verbose=False)["input_ids"] if filled else ():
            whole = [*ids, *end] if ids[-1:] != end else ids
            pieces = (whole[first : first + self.max_length] for first in range(0, len(whole), self.max_length))
            yield from (TokenRow(np.asarray(piece, np.int32), 0) for piece in pieces if len(piece) > 1)


class DemonstrationFeed:
    """Demonstrations of the train split, drawn with replacement."""

    def __init__(self, task: Task, encoder: Encoder) -> None:
        self._demonstrations, self._encoder = task.demonstrations("train"), encoder

    def take(self, draw: float) -> TokenRow:
        """The demonstration at the share ``draw`` of the split."""
        return self._encoder.demonstration(self._demonstrations[int(draw * len(self._demonstrations))])

    def skip(self, rows: int) -> None:
        """Do nothing: any demonstration is reached by its index."""


class PassFeed:
    """Endless rows from a source that is read in passes. ``read(number)`` gives pass ``number``, always the same
    rows."""

    def __init__(self, read: Callable[[int], Iterator[TokenRow]], name: str) -> None:
        self._read, self._name = read, name
        self._pass, self._skipping = 0, 0
        self._rows: Iterator[TokenRow] | None = None

    def skip(self, rows: int) -> None:
        """Skip rows; done when the next one is taken."""
        self._skipping += rows

    def take(self, draw: float) -> TokenRow:
        """The next row; ``ValueError`` when the source has none."""
        skipped_in_pass, fresh = 0, self._rows is None
        while True:
            if self._rows is None:
                self._rows, skipped_in_pass, fresh = self._read(self._pass), 0, True
            row = next(self._rows, None)
            if row is not None and self._skipping == 0:
                return row
            if row is not None:
                self._skipping -= 1
                skipped_in_pass += 1
                continue
            if fresh and skipped_in_pass == 0:
                raise ValueError(
                    f"{self._name} gives no training rows; check its path, column and min_reward, or "
                    "take it out of data"
                )
            self._rows = None
            self._pass += 1
            if fresh:
                # A pass was skipped from end to end: all have as many rows, so whole ones need not be read.
                self._pass += self._skipping // skipped_in_pass
                self._skipping %= skipped_in_pass


class TextSource:
    """Files of text; see the module's docstring."""

    def __init__(self, source: DataSource, encoder: Encoder, seed: int) -> None:
        self._path, self._column, self._encoder, self._seed = _path(source), source.column, encoder, seed
        self._files = text_files(self._path)

    def train(self, number: int) -> Iterator[TokenRow]:
        """Pass ``number``: files in a seeded order, windows through a seeded shuffle buffer."""
        rng = np.random.default_rng([self._seed, number])
        order = rng.permutation(len(self._files))
        return _shuffled((row for i in order for row, held in self._windows(int(i)) if not held), SHUFFLE_WINDOWS, rng)

    def heldout(self) -> Iterator[TokenRow]:
        """The windows that training never sees, in the order of the files."""
        return (row for i in range(len(self._files)) for row, held in self._windows(i) if held)

    def _windows(self, index: int) -> Iterator[tuple[TokenRow, bool]]:
        """Windows of one file with whether each is held out. The very first one is, so that a small text has one
        too."""
        path = self._files[index]
        offset = (
            0 if index == 0 else _hash(path.relative_to(self._path if self._path.is_dir() else path.parent).as_posix())
        )
        texts = read_texts(path, self._column)
        count = itertools.count(offset)
        while some := list(itertools.islice(texts, _TEXTS_AT_ONCE)):
            for row in self._encoder.windows(some):
                yield row, next(count) % HELDOUT_EVERY == 0


class ReplaySource:
    """Rollouts of an earlier run: prompt, generated and observed tokens; only the generated ones count."""

    def __init__(self, source: DataSource, encoder: Encoder, seed: int) -> None:
        self._path, self._encoder = _path(source), encoder
        columns = ["rollout_id", "prompt_id", "prompt_tokens", "tokens", "generated"]
        self._reader = ReplayReader(self._path, seed=seed, columns=columns, min_reward=source.min_reward)
        self._require_own_tokens()
        self._heldout, self._shared = self._choose_heldout()

    def _require_own_tokens(self) -> None:
        """``ValueError`` where none of the first rollouts has the words of the text beside it: token ids of another
        tokenizer are other words."""
        batch = next(self._reader.batches(columns=["tokens", "generated", "text"]), None)
        rows = [] if batch is None else batch.slice(0, _TEXTS_AT_ONCE).to_pylist()
        pairs = [
            (whole_characters(decode_response(self._encoder.tokenizer, row["tokens"])), row["text"])
            for row in rows
            if row["text"] and not row["generated"]  # of an episode the text has no observations
        ]
        # What was cut at a stop string ends in the middle; older versions left special tokens out.
        if pairs and not any(read.startswith(text) or {*text.split()} <= {*read.split()} for read, text in pairs):
            raise ValueError(
                f"the rollouts in {self._path} are of another tokenizer: {pairs[0][1]!r:.60} reads "
                f"{pairs[0][0]!r:.60} with this one; give rollouts of this base LM"
            )

    def _choose_heldout(self) -> tuple[frozenset[str], bool]:
        """The held-out prompts, and whether they must also be trained on (there is only one)."""
        prompts: set[str] = set()
        for batch in self._reader.batches(columns=["prompt_id"]):
            prompts.update(batch.column(0).unique().to_pylist())
        ranked = sorted(prompts, key=_hash)
        if len(ranked) == 1:
            _LOG.warning(
                "replay %s holds rollouts of one prompt only: held-out measures are taken on its training rows",
                self._path,
            )
            return frozenset(ranked), True
        chosen = frozenset(p for p in ranked if _hash(p) % HELDOUT_EVERY == 0)
        # None or all of a few prompts can fall to one side.
        return (chosen if 0 < len(chosen) < len(ranked) else frozenset(ranked[:1])), False

    def train(self, number: int) -> Iterator[TokenRow]:
        """Pass ``number`` over the rollouts, in a new order."""
        return (
            self._row(row) for row in self._reader.rows(number) if self._shared or row["prompt_id"] not in self._heldout
        )

    def heldout(self) -> Iterator[TokenRow]:
        """Rollouts of the held-out prompts."""
        return (self._row(row) for row in self._reader.rows() if row["prompt_id"] in self._heldout)

    def _row(self, row: dict[str, np.ndarray]) -> TokenRow:
        prompt, generated = row["prompt_tokens"], row["generated"]
        spoken = np.concatenate([np.zeros(len(prompt), bool), generated]) if len(generated) else None
        return self._encoder.cut(
            np.concatenate([prompt, row["tokens"]]), len(prompt), f"rollout {row['rollout_id']} of {self._path}", spoken
        )


def _task(source: DataSource, task: Task) -> Task:
    """The task a stream takes its demonstrations from: its own, else the run's."""
    return build_task(source.task) if source.task is not None else task


def training_feed(source: DataSource, task: Task, encoder: Encoder, *, seed: int) -> Feed:
    """The endless training rows of a source."""
    if source.kind == "task":
        return DemonstrationFeed(_task(source, task), encoder)
    kind = TextSource if source.kind == "text" else ReplaySource
    return PassFeed(kind(source, encoder, seed).train, f"the {source.kind} source {source.path}")


def heldout_rows(source: DataSource, task: Task, encoder: Encoder, *, seed: int) -> Iterator[TokenRow]:
    """The rows of a source that training never sees."""
    if source.kind == "task":
        demonstrations = _task(source, task).demonstrations("heldout")
        return (encoder.demonstration(demonstrations[i]) for i in range(len(demonstrations)))
    return (TextSource if source.kind == "text" else ReplaySource)(source, encoder, seed).heldout()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _path(source: DataSource) -> Path:
    if source.path is None:
        raise ValueError(f"a data source of kind {source.kind!r} needs a path")
    return Path(source.path)


def _shuffled(rows: Iterator[TokenRow], size: int, rng: np.random.Generator) -> Iterator[TokenRow]:
    """The rows in another order, ``size`` of them in memory."""
    buffer = list(itertools.islice(rows, size))
    for row in rows:
        place = int(rng.integers(size))
        yield buffer[place]
        buffer[place] = row
    yield from (buffer[i] for i in rng.permutation(len(buffer)))
