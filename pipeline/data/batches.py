"""Streams of token batches for the offline stages, from demonstrations, text files and the replay buffer.

A batch is a function of (seed, update): each of its rows first draws its source in proportion to the weights, then
takes the next row of that source. Demonstrations are drawn by index, so resuming skips them for free; text and rollouts
are read in passes, each pass in a new order, and resuming reads again up to where it was (their files must not change
within a run). All ranks walk the same global sequence and keep their own part of each batch. No file is ever held in
memory as a whole.

Held out: the task's own held-out split; about one window in 32 of a text; about one prompt in 32 of a replay buffer.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from configs.schema import DataSource
from latent_control.records import TokenBatch
from pipeline.replay.writer import ReplayReader
from rollout_workers.tasks import build_task
from rollout_workers.tasks.encoding import encode_demonstration, encode_episode
from rollout_workers.tasks.protocol import Demonstration, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_SUFFIXES = (".jsonl", ".parquet", ".txt")
HELDOUT_EVERY = 32
SHUFFLE_WINDOWS = 1024
"""Text windows in memory from which the next one is drawn."""
_BLOCK_CHARACTERS = 1_000_000
_TEXTS_AT_ONCE = 32
_LOG = logging.getLogger(__name__)


class Row(NamedTuple):
    """One sequence: its token ids, where the response starts (0: all of it counts), and of several turns which ids are
    responses."""

    ids: Sequence[int]
    start: int
    spoken: Sequence[bool] | None = None


class Feed(Protocol):
    """One source's endless training rows."""

    def take(self, draw: float) -> Row:
        """The next row; sources that are drawn by index use ``draw`` in [0, 1) instead of an order of their own."""
        ...

    def skip(self, rows: int) -> None:
        """Pass over the next ``rows`` rows."""
        ...


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """From texts to rows of at most ``max_length`` tokens."""

    tokenizer: PreTrainedTokenizerBase
    chat: bool
    max_length: int

    @property
    def pad(self) -> int:
        """What fills rows up; masked everywhere."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return int(next(i for i in ids if i is not None))

    def demonstration(self, demo: Demonstration) -> Row:
        """Prompt, response and end token (and further turns), cut to ``max_length``."""
        place = f"demonstration {demo.prompt.id}"
        if demo.later:
            ids, spoken = encode_episode(self.tokenizer, demo, chat=self.chat)
            return self.cut(ids, spoken.index(True), place, spoken)
        ids, start = encode_demonstration(self.tokenizer, demo, chat=self.chat)
        return self.cut(ids, start, place)

    def cut(self, ids: Sequence[int], start: int, place: str, spoken: Sequence[bool] | None = None) -> Row:
        """The first ``max_length`` tokens; ``ValueError`` when they hold nothing of the response."""
        if start >= self.max_length:
            raise ValueError(
                f"{place}: its prompt has {start} tokens and max_length is {self.max_length}, so nothing of its "
                "response "
                f"is left to train on; set the stage's max_length to more than {start}"
            )
        return Row(ids[: self.max_length], start, None if spoken is None else spoken[: self.max_length])

    def windows(self, texts: Sequence[str]) -> Iterator[Row]:
        """Texts, each with the end token, in pieces of ``max_length``.

        Left out: blank texts, and pieces of one token, in which nothing is predicted.
        """
        end = [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]
        filled = [text for text in texts if text.strip()]
        for ids in self.tokenizer(filled, verbose=False)["input_ids"] if filled else ():
            whole = [*ids, *end] if ids[-1:] != end else ids
            pieces = (whole[first : first + self.max_length] for first in range(0, len(whole), self.max_length))
            yield from (Row(np.asarray(piece, np.int32), 0) for piece in pieces if len(piece) > 1)


class DemonstrationFeed:
    """Demonstrations of the train split, drawn with replacement."""

    def __init__(self, task: Task, encoder: Encoder) -> None:
        self._demonstrations, self._encoder = task.demonstrations("train"), encoder

    def take(self, draw: float) -> Row:
        """The demonstration at the share ``draw`` of the split."""
        return self._encoder.demonstration(self._demonstrations[int(draw * len(self._demonstrations))])

    def skip(self, rows: int) -> None:
        """Nothing: any demonstration is reached by its index."""


class PassFeed:
    """Endless rows from a source that is read in passes. ``read(number)`` gives pass ``number``, always the same
    rows."""

    def __init__(self, read: Callable[[int], Iterator[Row]], name: str) -> None:
        self._read, self._name = read, name
        self._pass, self._skipping = 0, 0
        self._rows: Iterator[Row] | None = None

    def skip(self, rows: int) -> None:
        """Pass over rows; done when the next one is taken."""
        self._skipping += rows

    def take(self, draw: float) -> Row:
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

    def train(self, number: int) -> Iterator[Row]:
        """Pass ``number``: files in a seeded order, windows through a seeded shuffle buffer."""
        rng = np.random.default_rng([self._seed, number])
        order = rng.permutation(len(self._files))
        return _shuffled((row for i in order for row, held in self._windows(int(i)) if not held), SHUFFLE_WINDOWS, rng)

    def heldout(self) -> Iterator[Row]:
        """The windows that training never sees, in the order of the files."""
        return (row for i in range(len(self._files)) for row, held in self._windows(i) if held)

    def _windows(self, index: int) -> Iterator[tuple[Row, bool]]:
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
        self._heldout, self._shared = self._choose_heldout()

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

    def train(self, number: int) -> Iterator[Row]:
        """Pass ``number`` over the rollouts, in a new order."""
        return (
            self._row(row) for row in self._reader.rows(number) if self._shared or row["prompt_id"] not in self._heldout
        )

    def heldout(self) -> Iterator[Row]:
        """Rollouts of the held-out prompts."""
        return (self._row(row) for row in self._reader.rows() if row["prompt_id"] in self._heldout)

    def _row(self, row: dict[str, np.ndarray]) -> Row:
        prompt, generated = row["prompt_tokens"], row["generated"]
        spoken = np.concatenate([np.zeros(len(prompt), bool), generated]) if len(generated) else None
        return self._encoder.cut(
            np.concatenate([prompt, row["tokens"]]), len(prompt), f"rollout {row['rollout_id']} of {self._path}", spoken
        )


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
    feeds = [_feed(source, task, encoder, seed=seed + 1 + i) for i, source in enumerate(sources)]
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
        yield _batch(rows, encoder)


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
    rank: int = 0,
    world: int = 1,
) -> list[TokenBatch]:
    """Up to ``count`` held-out sequences, mixed like the training data, in batches of up to ``batch_size`` over all
    ranks.

    Fewer when the sources hold out fewer; always a multiple of ``world``. ``ValueError`` when there is none.
    """
    _share(batch_size, rank, world)
    encoder = Encoder(tokenizer=tokenizer, chat=chat, max_length=max_length)
    streams = [_heldout(source, task, encoder, seed=seed + 1 + i) for i, source in enumerate(sources)]
    rows = _mixed(streams, [source.weight for source in sources], count, seed)
    rows = rows[: len(rows) // world * world]
    if not rows:
        raise ValueError(
            f"the data holds out fewer than {world} sequences (one per worker); use more data or fewer workers"
        )
    batches = []
    for first in range(0, len(rows), batch_size):
        whole = rows[first : first + batch_size]
        share = _share(len(whole), rank, world)
        batches.append(_batch(whole[share.start : share.stop], encoder))
    return batches


def _mixed(streams: Sequence[Iterator[Row]], weights: Sequence[float], count: int, seed: int) -> list[Row]:
    """Rows drawn from the streams by weight until ``count`` are there or all streams have ended."""
    rng = np.random.default_rng([seed, 0])
    open_weights = np.asarray(weights, float)
    rows: list[Row] = []
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


def _task(source: DataSource, task: Task) -> Task:
    """The task a stream takes its demonstrations from: its own, else the run's."""
    return build_task(source.task) if source.task is not None else task


def _feed(source: DataSource, task: Task, encoder: Encoder, *, seed: int) -> Feed:
    if source.kind == "task":
        return DemonstrationFeed(_task(source, task), encoder)
    kind = TextSource if source.kind == "text" else ReplaySource
    return PassFeed(kind(source, encoder, seed).train, f"the {source.kind} source {source.path}")


def _heldout(source: DataSource, task: Task, encoder: Encoder, *, seed: int) -> Iterator[Row]:
    if source.kind == "task":
        demonstrations = _task(source, task).demonstrations("heldout")
        return (encoder.demonstration(demonstrations[i]) for i in range(len(demonstrations)))
    return (TextSource if source.kind == "text" else ReplaySource)(source, encoder, seed).heldout()


def _batch(rows: Sequence[Row], encoder: Encoder) -> TokenBatch:
    longest = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), longest), encoder.pad, np.int64)
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


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _path(source: DataSource) -> Path:
    if source.path is None:
        raise ValueError(f"a data source of kind {source.kind!r} needs a path")
    return Path(source.path)


def _shuffled(rows: Iterator[Row], size: int, rng: np.random.Generator) -> Iterator[Row]:
    """The rows in another order, ``size`` of them in memory."""
    buffer = list(itertools.islice(rows, size))
    for row in rows:
        place = int(rng.integers(size))
        yield buffer[place]
        buffer[place] = row
    yield from (buffer[i] for i in rng.permutation(len(buffer)))


def text_files(path: Path) -> list[Path]:
    """The text files at ``path``, a file or a folder searched to the bottom, sorted; ``ValueError`` when there is
    none."""
    if not path.exists():
        raise ValueError(
            f"{path} does not exist; set data.path to a {', '.join(TEXT_SUFFIXES)} file or a folder of them"
        )
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    found = [p for p in files if p.suffix in TEXT_SUFFIXES]
    if not found:
        raise ValueError(f"{path} is or holds no {', '.join(TEXT_SUFFIXES)} file")
    return found


def read_texts(path: Path, column: str) -> Iterator[str]:
    """The texts of one file, in order, a line, a row group or a paragraph in memory at a time.

    ``.jsonl``: the value of ``column`` in each line; ``.parquet``: its rows; ``.txt``: blocks between blank lines.
    ``ValueError`` names file, line or row, and what to do.
    """
    if path.suffix == ".txt":
        return _paragraphs(path)
    return _jsonl_texts(path, column) if path.suffix == ".jsonl" else _parquet_texts(path, column)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, decoded one by one so that a bad one can be named."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
                ) from error


def _jsonl_texts(path: Path, column: str) -> Iterator[str]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # JSON can spell halves of characters, which no text has
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: no JSON ({error}): {line.strip()[:80]!r}; mend or remove the line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{place}: a JSON object is wanted, not {line.strip()[:80]!r}; mend or remove the line")
        if column not in row:
            raise ValueError(f"{place}: no key {column!r}; {_hint(column, row)}")
        yield _text(row[column], place, column)


def _parquet_texts(path: Path, column: str) -> Iterator[str]:
    try:
        with pq.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise ValueError(f"{path}: no column {column!r}; {_hint(column, file.schema_arrow.names)}")
            row = itertools.count()
            for batch in file.iter_batches(batch_size=256, columns=[column], use_threads=False):
                for value in batch.column(0).to_pylist():
                    yield _text(value, f"{path}, row {next(row)}", column)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise ValueError(
            f"{path}: no readable Parquet file ({str(error).partition(chr(10))[0]}); write it again or remove it"
        ) from error


def _paragraphs(path: Path) -> Iterator[str]:
    """Blocks between blank lines; one that grows past a million characters is cut there."""
    block: list[str] = []
    size = 0
    for _, line in _lines(path):
        if line.strip():
            block.append(line)
            size += len(line)
        if block and (not line.strip() or size > _BLOCK_CHARACTERS):
            yield "".join(block).strip()
            block, size = [], 0
    if block:
        yield "".join(block).strip()


def _text(value: object, place: str, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"{place}: {column!r} is {value!r:.60} ({type(value).__name__}), not a text; mend or remove the row"
        )
    return value


def _hint(column: str, names: Sequence[str] | dict[str, object]) -> str:
    near = difflib.get_close_matches(column, list(names), n=1)
    there = f"it has {', '.join(map(repr, names)) or 'none'}"
    return f"did you mean column: {near[0]}? ({there})" if near else f"{there}; set column to one of them"
