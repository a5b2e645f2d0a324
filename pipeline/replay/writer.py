"""The replay buffer: append-only Parquet shards, one row per rollout, readable without this code.

    <run>/replay/run=<run id>/part-00000000-<sha8>.parquet   zstd, row groups of 256
    <run>/replay/run=<run id>/_manifest.json                 the complete shards with their hashes, written last
    <run>/replay/_quarantine/...                             what was found damaged or foreign, each with a reason file

``pandas.read_parquet("<run>/replay")`` and duckdb's ``read_parquet('<run>/replay/run=*/*.parquet')`` give the rows of
``SCHEMA``, whose fields carry their own description. Parquet readers pass over names that start with ``_`` or ``.``.
A shard is written to a hidden name, synced, renamed, then entered into the manifest; one that a kill left between the
last two steps is adopted when the hash in its name fits. Delivery is exactly once: rows are known by ``rollout_id``.
"""

from __future__ import annotations

import json
import logging
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.evaluation.outcomes import Outcome
from pipeline.runs.layout import REPLAY
from pipeline.storage.atomic import fsync_file, fsync_folder, sealed, sha256_file, unseal, write_atomic
from rollout_workers.rollouts import Rollout

SCHEMA_VERSION = 4
OLDER = {2: ("reward_hash", "generated", "turn_rewards"), 3: ("generated", "turn_rewards")}
"""Schema versions that are read too, with the columns that their shards lack."""
ROW_GROUP = 256
MANIFEST = "_manifest.json"
QUARANTINE = "_quarantine"
OPEN_FILES = 64  # of one reader: a row group then costs no new look at its file
_METADATA = b"latent_control.replay"
_NAME = re.compile(r"part-([0-9]{8})-([0-9a-f]{8})\.parquet")
_LOG = logging.getLogger(__name__)


def _field(name: str, kind: pa.DataType, doc: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"doc": doc})


def _items(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", kind, nullable=False))


SCHEMA = pa.schema(
    [
        _field("rollout_id", pa.string(), "unique over all runs; a row delivered twice is stored once"),
        _field("group_id", pa.string(), "the rollouts of one prompt in one update share it"),
        _field("prompt_id", pa.string(), "<task>/<split>/<index>"),
        _field("prompt_text", pa.string(), "what the model was given, before the chat template"),
        _field("text", pa.string(), "what it generated, without special tokens"),
        _field("prompt_tokens", _items(pa.int32()), "token ids of the prompt, chat template included"),
        _field(
            "tokens",
            _items(pa.int32()),
            "token ids after the prompt, end tokens included: generated, or observed between turns",
        ),
        _field(
            "generated",
            _items(pa.int8()),
            "1 at each generated token, 0 at observed ones; empty where all were generated",
        ),
        _field(
            "actions",
            _items(pa.int32()),
            "the code that produced each generated token (the token itself at level token)",
        ),
        _field(
            "action_logp",
            _items(pa.float32()),
            "natural logarithm of the behaviour policy's probability of each action",
        ),
        _field("prompt_length", pa.int32(), "tokens of the prompt"),
        _field("length", pa.int32(), "tokens after the prompt"),
        _field(
            "finish_reason",
            pa.string(),
            "stop, length (cut off); of episodes terminated, *_limit (cut off), lost (no verdict)",
        ),
        _field("reward", pa.float64(), "the verifier's score; null when it failed", nullable=True),
        _field("turn_rewards", _items(pa.float32()), "reward of each turn of an episode; empty for a single response"),
        _field("reward_parts", pa.map_(pa.string(), pa.float64()), "named parts of the score"),
        _field(
            "reward_hash",
            pa.string(),
            "names the definition of the reward (task, options, weights); empty before schema version 3",
        ),
        _field("success", pa.bool_(), "the verifier's full mark"),
        _field("failure_kind", pa.string(), "class of the verifier's failure; null when it judged", nullable=True),
        _field("failure", pa.string(), "'kind: message' of the verifier's failure; null when it judged", nullable=True),
        _field(
            "policy_version", pa.int64(), "learner updates done by the policy that sampled (the oldest one that did)"
        ),
        _field("policy_hash", pa.string(), "SHA-256 of that policy's weights"),
        _field(
            "action_versions",
            _items(pa.int32()),
            "policy version that chose each action; empty where policy_version chose all",
        ),
        _field("world_hash", pa.string(), "SHA-256 of codebook and merge module"),
        _field("codebook_hash", pa.string(), "SHA-256 of the codebook: what the numbers in actions mean"),
        _field("level", pa.string(), "latent (codes sampled), token (baseline) or base (base LM)"),
        _field("seed", pa.int64(), "of this rollout's own random stream"),
        _field("worker", pa.int32(), "index of the rollout worker"),
        _field("created", pa.timestamp("us", tz="UTC"), "when it was finished"),
    ]
)


OUTCOME_SCHEMA = pa.schema(
    [
        _field("variant", pa.string(), "which model answered: base, cloned, finetuned, improved, token_level"),
        _field("mode", pa.string(), "sampled or greedy"),
        _field("prompt_id", pa.string(), "<task>/heldout/<index>"),
        _field("sample", pa.int32(), "0 to samples_per_prompt - 1; 0 when greedy"),
        _field("success", pa.bool_(), "the verifier's full mark"),
        _field("reward", pa.float64(), "the verifier's score; null when it failed", nullable=True),
        _field("reward_parts", pa.map_(pa.string(), pa.float64()), "named parts of the score"),
        _field("response", pa.string(), "what the model generated, without special tokens"),
        _field("prompt", pa.string(), "what the model was given, before the chat template"),
        _field("new_tokens", pa.int32(), "generated tokens, the end token included"),
    ]
)


# A dictionary pays where a row group repeats values; where values are many it costs time and bytes.
_MANY_VALUES = {"rollout_id", "text", "prompt_tokens", "tokens", "action_logp", "seed", "created"}
_LEAVES: dict[str, tuple[str, ...]] = {"reward_parts": ("reward_parts.key_value.key", "reward_parts.key_value.value")}
_LEAVES |= {name: (f"{name}.list.element",) for name in ("actions", "action_versions", "generated", "turn_rewards")}
_ENCODING: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": [
        leaf for name in SCHEMA.names if name not in _MANY_VALUES for leaf in _LEAVES.get(name, (name,))
    ],
    "column_encoding": {"action_logp.list.element": "BYTE_STREAM_SPLIT"},  # floats of one size share their high bytes
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Added:
    """What became of rollouts handed over. ``Added(rows=15, duplicates=1)``."""

    rows: int
    duplicates: int
    lost: tuple[str, ...] = ()
    """Object references whose owner died before they could be read."""
    actor: str = ""
    """Which incarnation of a ``ReplayActor`` took them: rows that an earlier one had not put on the disk are gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quarantined:
    """A shard that is not read. ``Quarantined(shard="run=a/part-00000003-1f00aa07.parquet", reason="...",
    moved_to=...)``."""

    shard: str
    """Path relative to the replay folder."""
    reason: str
    moved_to: Path | None
    """``None`` when it is gone, or could not be moved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A shard in order."""

    path: Path
    entry: dict[str, Any]
    """Its line in the manifest."""
    footer: pq.FileMetaData


def to_table(rollouts: Sequence[Rollout]) -> pa.Table:
    """Rollouts as a table of ``SCHEMA``; token columns are concatenated, never looped over."""
    columns: dict[str, Any] = {}
    for field in SCHEMA:
        if pa.types.is_list(field.type):
            arrays = [getattr(r, field.name) for r in rollouts]
            offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
            values = np.concatenate(arrays) if arrays else np.empty(0)
            values = values.view(np.int8) if values.dtype == bool else values
            columns[field.name] = pa.ListArray.from_arrays(
                offsets, pa.array(values, field.type.value_type), type=field.type
            )
    columns["prompt_length"] = [len(r.prompt_tokens) for r in rollouts]
    columns["length"] = [len(r.tokens) for r in rollouts]
    columns["reward_parts"] = [list(r.reward_parts.items()) for r in rollouts]
    columns["failure_kind"] = [r.failure and r.failure.partition(":")[0] for r in rollouts]
    columns["created"] = [round(r.created * 1e6) for r in rollouts]
    rest = [name for name in SCHEMA.names if name not in columns]
    columns |= zip(
        rest, zip(*map(attrgetter(*rest), rollouts), strict=True) if rollouts else [()] * len(rest), strict=True
    )
    arrays = [
        c if isinstance(c, pa.Array) else pa.array(c, SCHEMA.field(n).type)
        for n, c in ((f.name, columns[f.name]) for f in SCHEMA)
    ]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


class ReplayWriter:
    """Appends rollouts to ``folder/run=<run_id>``. One writer per run at a time; opening it again continues.

    Rows wait in memory until ``rows_per_shard`` are there, ``flush`` or ``close``.
    """

    def __init__(self, folder: Path, rows_per_shard: int, run_id: str) -> None:
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard is {rows_per_shard}; it must be at least 1")
        if not re.fullmatch(r"[^/\\%=\x00-\x1f]+", run_id):
            raise ValueError(
                f"run_id is {run_id!r}; it names a folder: leave out '/', '\\', '%', '=' and control characters"
            )
        self._root, self._partition = Path(folder), Path(folder) / f"run={run_id}"
        self._rows_per_shard, self._run_id = rows_per_shard, run_id
        self._partition.mkdir(parents=True, exist_ok=True)
        for unfinished in self._partition.glob(".part-*.tmp"):
            unfinished.unlink()
        shards, self.quarantined = _open_partition(self._root, self._partition)
        names = [shard.path.name for shard in shards] + [Path(q.shard).name for q in self.quarantined]
        self._next = 1 + max((int(match[1]) for name in names if (match := _NAME.fullmatch(name))), default=-1)
        self._entries = [shard.entry for shard in shards]
        # A reader that opens the buffer later must still be able to tell that rows are missing.
        self._lost = _lost_before(self._partition) + [
            {"name": Path(q.shard).name, "reason": q.reason} for q in self.quarantined
        ]
        self._seen = {rollout_id for shard in shards for rollout_id in _read_column(shard, "rollout_id")}
        self._pending: list[Rollout] = []
        self._write_manifest()

    @property
    def rows(self) -> int:
        """Rows taken in, those still in memory included."""
        return sum(entry["rows"] for entry in self._entries) + len(self._pending)

    def add(self, rollouts: Sequence[Rollout]) -> Added:
        """Take in rollouts that are not there yet; ``ValueError`` when one's columns differ in length (none is
        taken)."""
        for rollout in rollouts:
            lengths = len(rollout.tokens), len(rollout.actions), len(rollout.action_logp)
            if len(set(lengths)) > 1:
                raise ValueError(
                    f"rollout {rollout.rollout_id}: tokens, actions and action_logp have lengths {lengths}; they must "
                    "be equal"
                )
            if len(rollout.generated) not in (0, len(rollout.tokens)):
                raise ValueError(
                    f"rollout {rollout.rollout_id}: {len(rollout.generated)} marks generated for {lengths[0]} tokens"
                )
        before = len(self._seen)
        for rollout in rollouts:
            if rollout.rollout_id not in self._seen:
                self._seen.add(rollout.rollout_id)
                self._pending.append(rollout)
        while len(self._pending) >= self._rows_per_shard:
            self._write_shard(self._rows_per_shard)
        rows = len(self._seen) - before
        return Added(rows=rows, duplicates=len(rollouts) - rows)

    def flush(self) -> None:
        """Put everything taken in on the disk (before a checkpoint that counts on it)."""
        if self._pending:
            self._write_shard(len(self._pending))

    def close(self) -> None:
        """The last flush."""
        self.flush()

    def _write_shard(self, rows: int) -> None:
        rollouts = self._pending[:rows]
        table = to_table(rollouts)
        versions = [r.policy_version for r in rollouts]
        about: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "run_id": self._run_id, "rows": rows}
        about |= {"min_policy_version": min(versions), "max_policy_version": max(versions)}
        hashes = {
            f"{name}es": sorted({getattr(r, name) for r in rollouts})
            for name in ("policy_hash", "world_hash", "codebook_hash")
        }
        staged = self._partition / f".part-{self._next:08d}.tmp"
        table = table.replace_schema_metadata({_METADATA: json.dumps(about | hashes)})
        pq.write_table(table, staged, row_group_size=ROW_GROUP, write_page_checksum=True, **_ENCODING)
        fsync_file(staged)
        digest = sha256_file(staged)
        path = self._partition / f"part-{self._next:08d}-{digest[:8]}.parquet"
        entry = {"name": path.name, "sha256": digest, "bytes": staged.stat().st_size} | about
        os.replace(staged, path)
        fsync_folder(self._partition)
        self._entries.append(entry)
        self._write_manifest()
        self._next += 1
        # Only now: a failed write (disk full) keeps the rows, and the next flush tries again.
        del self._pending[:rows]

    def _write_manifest(self) -> None:
        content = {
            "schema_version": SCHEMA_VERSION,
            "run_id": self._run_id,
            "shards": self._entries,
            "lost": self._lost,
        }
        write_atomic(self._partition / MANIFEST, sealed(content))


class ReplayActor:
    """A ``ReplayWriter`` behind object references: rollouts go from worker to disk without passing the driver.

    Wrap it: ``ray.remote(num_cpus=0, max_restarts=-1)(ReplayActor).remote(folder, rows_per_shard, run_id)``.
    """

    def __init__(self, folder: Path, rows_per_shard: int, run_id: str) -> None:
        self._writer = ReplayWriter(folder, rows_per_shard, run_id)
        self._incarnation = uuid.uuid4().hex

    def add(self, refs: Sequence[Any]) -> Added:
        """Store the lists of rollouts behind ``refs`` (handed over inside a list, so that Ray does not fetch them
        early)."""
        import ray
        from ray.exceptions import ObjectLostError

        rows, duplicates, lost = 0, 0, []
        for ref in refs:
            try:
                added = self._writer.add(ray.get(ref))
            except ObjectLostError as error:
                lost.append(str(error).partition("\n")[0])
                continue
            rows, duplicates = rows + added.rows, duplicates + added.duplicates
        return Added(rows=rows, duplicates=duplicates, lost=tuple(lost), actor=self._incarnation)

    def flush(self) -> Added:
        """Put everything on the disk; ``rows`` are those stored so far."""
        self._writer.flush()
        return Added(rows=self._writer.rows, duplicates=0, actor=self._incarnation)


class ReplayReader:
    """Streams rows of a run's replay buffer, shuffled by seed, each row to exactly one rank.

    ``folder`` is a run folder, its ``replay`` folder or one partition. Every shard is checked against its hash and the
    schema when the reader opens; what fails is moved to ``_quarantine``, logged as a warning, and listed in
    ``quarantined``. Row groups are dealt to ranks, so ranks differ by up to a row group of rows. Shuffling mixes the
    rows of ``window`` row groups drawn from anywhere; at most that many are in memory.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        columns: Sequence[str] | None = None,
        min_reward: float | None = None,
        batch_size: int = ROW_GROUP,
        window: int = 8,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}: ranks count from 0")
        unknown = sorted(set(columns or ()) - set(SCHEMA.names))
        if unknown:
            raise ValueError(f"the replay buffer has no column {', '.join(unknown)}; it has {', '.join(SCHEMA.names)}")
        self.root = _replay_root(Path(folder))
        self._seed, self._rank, self._world, self._shuffle = seed, rank, world, shuffle
        self._columns = list(columns) if columns is not None else SCHEMA.names
        self._min_reward, self._batch_size, self._window = min_reward, batch_size, window
        self.shards, quarantined = _open_all(self.root)
        self.quarantined: tuple[Quarantined, ...] = tuple(quarantined)
        self.rows_stored = sum(shard.footer.num_rows for shard in self.shards)
        """Rows of all ranks, before ``min_reward``."""
        self._open = lru_cache(maxsize=OPEN_FILES)(self._open_shard)

    def batches(self, epoch: int = 0, *, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """One pass over this rank's rows in record batches of up to ``batch_size``; ``epoch`` sets another order.

        ``columns``: only these of the reader's.
        """
        columns = self._columns if columns is None else list(columns)
        rng = np.random.default_rng([self._seed, epoch])
        groups = [(number, i) for number, shard in enumerate(self.shards) for i in range(shard.footer.num_row_groups)]
        if self._shuffle:
            groups = [groups[i] for i in rng.permutation(len(groups))]
        mine = groups[self._rank :: self._world]
        # Each rank shuffles with its own stream; the deal above must be the same on all of them.
        rng = np.random.default_rng([self._seed, epoch, self._rank + 1])
        for first in range(0, len(mine), self._window):
            table = pa.concat_tables(
                [self._read(number, i, columns) for number, i in mine[first : first + self._window]]
            )
            if self._shuffle:
                table = _take(table, pa.array(rng.permutation(len(table))))
            yield from (b for b in table.combine_chunks().to_batches(max_chunksize=self._batch_size) if len(b))

    def rows(self, epoch: int = 0) -> Iterator[dict[str, Any]]:
        """The same rows as dicts; token columns are numpy arrays (int32, float32, bool), ``reward_parts`` is a dict."""
        for batch in self.batches(epoch):
            columns = [_python_column(batch.column(i), batch.schema.field(i)) for i in range(batch.num_columns)]
            for values in zip(*columns, strict=True):
                yield dict(zip(self._columns, values, strict=True))

    def _open_shard(self, number: int) -> pq.ParquetFile:
        shard = self.shards[number]
        return pq.ParquetFile(shard.path, metadata=shard.footer, page_checksum_verification=True)

    def _read(self, number: int, group: int, columns: Sequence[str]) -> pa.Table:
        wanted = list(columns) if self._min_reward is None or "reward" in columns else [*columns, "reward"]
        table = _completed(
            self._open(number).read_row_group(group, columns=wanted, use_threads=False).replace_schema_metadata(None),
            wanted,
        )
        if self._min_reward is not None:
            table = table.filter(pc.greater_equal(table["reward"], self._min_reward))
        return table.select(columns)


def _completed(table: pa.Table, wanted: Sequence[str]) -> pa.Table:
    """``table`` with empty texts and lists for the columns that an older shard lacks."""
    for name in wanted:
        if name not in table.column_names:
            field = SCHEMA.field(name)
            table = table.append_column(
                field, pa.array([[] if pa.types.is_list(field.type) else ""] * len(table), field.type)
            )
    return table.select(wanted)


def _take(table: pa.Table, order: pa.Array) -> pa.Table:
    """``table.take(order)``, with whole token rows copied at once."""
    columns = [column.combine_chunks() for column in table.columns]
    return pa.Table.from_arrays(
        [_take_lists(c, order) if pa.types.is_list(c.type) else c.take(order) for c in columns], schema=table.schema
    )


def _take_lists(column: pa.ListArray, order: pa.Array) -> pa.ListArray:
    """``column.take(order)``, which pyarrow does number by number; seen as byte strings, rows are copied 15 times as
    fast."""
    values = column.values.to_numpy()
    bounds = column.offsets.to_numpy().astype(np.int64) * values.itemsize
    rows = pa.Array.from_buffers(pa.large_binary(), len(column), [None, pa.py_buffer(bounds), pa.py_buffer(values)])
    _, bounds, data = rows.take(order).buffers()
    offsets = np.frombuffer(bounds, np.int64, len(order) + 1) // values.itemsize
    flat = pa.Array.from_buffers(column.type.value_type, offsets[-1], [None, data])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat, type=column.type)


def _python_column(column: pa.Array, field: pa.Field) -> Sequence[Any]:
    if pa.types.is_map(field.type):
        return [dict(pairs) for pairs in column.to_pylist()]
    if pa.types.is_list(field.type):
        offsets = column.offsets.to_numpy()
        values = column.values.to_numpy()
        values = values.view(bool) if values.dtype == np.int8 else values
        return [values[start:stop] for start, stop in pairwise(offsets)]
    return column.to_pylist()


def _replay_root(folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give a run folder or its replay folder")
    if (folder / REPLAY).is_dir():
        return folder / REPLAY
    return folder.parent if folder.name.startswith("run=") else folder


def _open_all(root: Path) -> tuple[list[Shard], list[Quarantined]]:
    """Every shard under a replay folder, in the order of names; strays outside of partitions are foreign."""
    shards: list[Shard] = []
    quarantined: list[Quarantined] = []
    for path in sorted(root.glob("*.parquet")):
        quarantined.append(
            _quarantine(root, path, "it lies outside of the run=<id> folders: not written by this buffer")
        )
    for partition in sorted(path for path in root.glob("run=*") if path.is_dir()):
        good, bad = _open_partition(root, partition)
        shards, quarantined = shards + good, quarantined + bad
    return shards, quarantined


def _open_partition(root: Path, partition: Path) -> tuple[list[Shard], list[Quarantined]]:
    """The good shards of a partition, whether or not the manifest has them yet, and what was put aside."""
    entries = _read_manifest(partition)
    shards, quarantined = [], []
    for path in sorted(partition.glob("[!._]*.parquet")):
        try:
            shards.append(_verified(path, entries.pop(path.name, None), partition.name.removeprefix("run=")))
        except (ValueError, OSError) as error:
            entries.pop(path.name, None)
            quarantined.append(_quarantine(root, path, str(error)))
    for name, entry in entries.items():
        lost = Quarantined(
            shard=f"{partition.name}/{name}",
            reason=f"it is missing; the manifest lists it with {entry['rows']} rows",
            moved_to=None,
        )
        _LOG.warning("replay buffer %s: shard %s: %s", root, lost.shard, lost.reason)
        quarantined.append(lost)
    return shards, quarantined


def _read_manifest(partition: Path) -> dict[str, dict[str, Any]]:
    """Entries by name. A damaged manifest costs nothing but the full hashes: names and pages carry checksums too."""
    try:
        content = unseal(partition / MANIFEST)
    except FileNotFoundError:
        if any(partition.glob("part-*.parquet")):
            _LOG.warning(
                "replay buffer %s: no %s; the shards are checked by the hashes in their names instead",
                partition,
                MANIFEST,
            )
        return {}
    except ValueError as error:
        _LOG.warning(
            "replay buffer %s: %s; the shards are checked by the hashes in their names instead", partition, error
        )
        return {}
    return {entry["name"]: entry for entry in content["shards"]}


def manifest_problems(root: Path) -> list[str]:
    """What is wrong with the manifests of a replay folder, a line each; without one, shards are checked by the 32 bits
    in their names."""
    found = []
    for partition in sorted(path for path in root.glob("run=*") if path.is_dir()):
        try:
            unseal(partition / MANIFEST)
        except FileNotFoundError:
            found.append(f"{partition.name}/{MANIFEST} is missing")
        except ValueError as error:
            found.append(f"{partition.name}/{error}")
    return found


def _lost_before(partition: Path) -> list[dict[str, str]]:
    try:
        return list(unseal(partition / MANIFEST)["lost"])
    except (FileNotFoundError, ValueError):
        return []


def _verified(path: Path, entry: dict[str, Any] | None, run_id: str) -> Shard:
    """A shard whose bytes, schema and origin are right; ``ValueError`` says what is not."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError("its name is not part-<number>-<hash>.parquet: not written by this buffer")
    digest = sha256_file(path)
    expected = entry["sha256"] if entry else match[2]
    if not digest.startswith(expected):
        raise ValueError(f"its SHA-256 is {digest[:12]}, written was {expected[:12]}: damaged after it was written")
    try:
        footer = pq.read_metadata(path)
        schema = footer.schema.to_arrow_schema()
        about = json.loads((schema.metadata or {}).get(_METADATA, b"null"))
    except (pa.ArrowException, ValueError, OSError) as error:
        raise ValueError(f"it is no readable Parquet file: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(about, dict):
        raise ValueError("it carries no replay schema: not written by this buffer")
    version = about.get("schema_version")
    if version != SCHEMA_VERSION and version not in OLDER:
        known = ", ".join(map(str, sorted([*OLDER, SCHEMA_VERSION])))
        raise ValueError(f"it has schema version {version!r}, this version reads {known}")
    if about.get("run_id") != run_id:
        raise ValueError(f"it belongs to run {about.get('run_id')!r}, not to {run_id!r}")
    if not schema.equals(pa.schema([f for f in SCHEMA if f.name not in OLDER.get(version, ())])):
        raise ValueError("its columns are not those of the replay schema")
    kept = ("schema_version", "run_id", "rows", "min_policy_version", "max_policy_version")
    found = {"name": path.name, "sha256": digest, "bytes": path.stat().st_size} | {key: about[key] for key in kept}
    return Shard(path=path, entry=found, footer=footer)


def _quarantine(root: Path, path: Path, reason: str) -> Quarantined:
    """Move a shard out of every reader's way and say so; the bytes are kept."""
    relative = path.relative_to(root)
    # Not *.parquet: a reader with a wide glob must not find it either.
    target: Path | None = root / QUARANTINE / relative.parent / f"{path.name}.quarantined"
    assert target is not None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        while target.exists():
            target = target.with_name(f"{target.name}+")
        path.rename(target)
        target.with_name(f"{target.name}.reason.txt").write_text(f"{relative}: {reason}\n")
        outcome = f"moved to {target}"
    except OSError as error:
        outcome, target = f"it could not be moved ({error.strerror}) and is passed over", None
    _LOG.warning("replay buffer %s: shard %s is not used: %s (%s)", root, relative, reason, outcome)
    return Quarantined(shard=str(relative), reason=reason, moved_to=target)


def _read_column(shard: Shard, name: str) -> list[Any]:
    with pq.ParquetFile(shard.path, metadata=shard.footer) as file:
        return file.read(columns=[name]).column(0).to_pylist()


def write_outcomes(path: Path, outcomes: Sequence[Outcome]) -> None:
    """The judged responses of an evaluation as one Parquet file (``OUTCOME_SCHEMA``), put at ``path`` whole."""
    columns = {name: [getattr(outcome, name) for outcome in outcomes] for name in OUTCOME_SCHEMA.names}
    columns["reward_parts"] = [list(parts.items()) for parts in columns["reward_parts"]]
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=OUTCOME_SCHEMA), buffer, compression="zstd")
    write_atomic(path, buffer.getvalue().to_pybytes())


def read_outcomes(path: Path) -> list[Outcome]:
    """What ``write_outcomes`` wrote; ``ValueError`` when it is no such file."""
    try:
        rows = pq.read_table(path, schema=OUTCOME_SCHEMA).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is no evaluation file ({str(error).partition(chr(10))[0]}); make it again: latent-control evaluate"
        ) from error
    return [Outcome(**row | {"reward_parts": dict(row["reward_parts"])}) for row in rows]
