"""Replay buffer: rows/s and MB/s written and streamed, against raw pyarrow with the same rows, schema, zstd, row groups
and files.

    python benchmarks/replay.py [--repeats 7] [--quick] [--out DIR]

Long rollouts (128 + 512 tokens) and tiny ones (8 + 8). Write: ``ReplayWriter`` (hash, fsync, rename, manifest,
duplicates dropped), in requests of 128 rollouts, against ``pq.write_table`` per shard, from the same Python records and
from ready-made tables; raw pyarrow neither syncs nor hashes. Stream: ``ReplayReader`` opened again (hashes checked) and
one pass of record batches, shuffled as by default and in order, against ``iter_batches`` of each file, in order. Both
read from the page cache. MB are those of the decoded table. One process; pyarrow's own threads are one on both sides.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import alternate, arguments, ratio, report, short, spread

from pipeline.replay.reader import ReplayReader
from pipeline.replay.schema import ROW_GROUP, SCHEMA
from pipeline.replay.writer import ReplayWriter, to_table
from rollout_workers.rollouts import Rollout

SHARD = 4096
"""Rows per shard, the default of ``replay.rows_per_shard``."""
REQUEST = 128
"""Rollouts that arrive together: an update of 16 prompts x 8."""


def rollouts(count: int, prompt: int, response: int) -> list[Rollout]:
    """Records as workers make them: random tokens and codes, lengths within a tenth of ``response``, a chat-sized
    text."""
    rng = np.random.default_rng(0)
    words = [f"word{number} " for number in range(1000)]
    made = []
    for index in range(count):
        length = int(rng.integers(response - response // 10, response + 1))
        made.append(
            Rollout(
                rollout_id=f"train-7-counter/train/{index // 8}-{index}",
                group_id=f"train-7-counter/train/{index // 8}",
                prompt_id=f"counter/train/{index // 8}",
                prompt_text="".join(words[i] for i in rng.integers(0, 1000, prompt)),
                text="".join(words[i] for i in rng.integers(0, 1000, length)),
                prompt_tokens=rng.integers(0, 49152, prompt, dtype=np.int32),
                tokens=rng.integers(0, 49152, length, dtype=np.int32),
                actions=rng.integers(0, 64, length, dtype=np.int32),
                action_logp=-rng.random(length, dtype=np.float32),
                finish_reason="stop",
                reward=float(index % 2),
                reward_parts={"format": 1.0, "answer": float(index % 2)},
                success=index % 2 == 1,
                failure=None,
                policy_version=index // 128,
                policy_hash=f"{index // 128:064d}",
                world_hash="1" * 64,
                codebook_hash="2" * 64,
                level="latent",
                seed=int(rng.integers(2**62)),
                worker=index % 2,
                created=1.7e9 + index,
            )
        )
    return made


def plain_table(rows: Sequence[Rollout]) -> pa.Table:
    """The same table as one would build it with pyarrow alone: a list per column."""
    columns = {field.name: [getattr(r, field.name, None) for r in rows] for field in SCHEMA}
    columns["prompt_length"] = [len(r.prompt_tokens) for r in rows]
    columns["length"] = [len(r.tokens) for r in rows]
    columns["reward_parts"] = [list(r.reward_parts.items()) for r in rows]
    columns["created"] = [round(r.created * 1e6) for r in rows]
    return pa.Table.from_pydict(columns, schema=SCHEMA)


def write_plain(tables: Iterable[pa.Table], folder: Path) -> None:
    """One file per table."""
    for number, table in enumerate(tables):
        pq.write_table(table, folder / f"{number:04d}.parquet", compression="zstd", row_group_size=ROW_GROUP)


def stream_plain(folder: Path) -> int:
    """Every row once in record batches; returns the rows."""
    rows = 0
    for path in sorted(folder.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            rows += sum(len(batch) for batch in file.iter_batches(ROW_GROUP, use_threads=False))
    return rows


def measure(rows: list[Rollout], repeats: int, work: Path) -> dict[str, list[float]]:
    """Seconds per side and round."""
    parts = [rows[first : first + SHARD] for first in range(0, len(rows), SHARD)]
    ready = [to_table(part) for part in parts]

    def write_ours() -> None:
        writer = ReplayWriter(work / "ours", SHARD, "a")
        for first in range(0, len(rows), REQUEST):
            writer.add(rows[first : first + REQUEST])
        writer.close()

    def stream_ours(reader: ReplayReader) -> None:
        assert sum(map(len, reader.batches())) == len(rows)

    def timed(job: Callable[[], object], folder: str | None = None) -> Callable[[], float]:
        def once() -> float:
            if folder:
                shutil.rmtree(work / folder, ignore_errors=True)
                (work / folder).mkdir()
            started = time.perf_counter()
            job()
            return time.perf_counter() - started

        return once

    writing = {
        "write ours": timed(write_ours, "ours"),
        "write pyarrow, from records": timed(lambda: write_plain(map(plain_table, parts), work / "plain"), "plain"),
        "write pyarrow, ready tables": timed(lambda: write_plain(ready, work / "plain"), "plain"),
    }
    seconds = alternate(writing, repeats)
    (work / "ours").rename(work / "kept")
    opened = ReplayReader(work / "kept")
    streaming = {
        "stream ours, shuffled": timed(lambda: stream_ours(ReplayReader(work / "kept"))),
        "stream ours, shuffled, open already": timed(lambda: stream_ours(opened)),
        "stream ours, in order": timed(lambda: stream_ours(ReplayReader(work / "kept", shuffle=False))),
        "stream pyarrow": timed(lambda: stream_plain(work / "plain")),
    }
    return seconds | alternate(streaming, repeats)


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, repeats=7)
    options = parser.parse_args()
    sizes = {"long": (SHARD, 128, 512), "tiny": (8 * SHARD, 8, 8)}
    if options.quick:
        sizes = {"long": (64, 16, 64), "tiny": (256, 8, 8)}
    pa.set_cpu_count(1)
    lines, raw = [], {}
    for size, (count, prompt, response) in sizes.items():
        rows = rollouts(count, prompt, response)
        megabytes = to_table(rows).nbytes / 1e6
        with tempfile.TemporaryDirectory() as work:
            seconds = measure(rows, options.repeats, Path(work))
        raw[size] = {"rows": count, "megabytes": megabytes, "seconds": seconds}
        for side, values in seconds.items():
            peers = [
                name
                for name in seconds
                if name.startswith(side.partition(" ")[0]) and "pyarrow" in name and "ours" in side
            ]
            ratios = {
                name.partition("pyarrow")[2].strip(", ") or "pyarrow": ratio(seconds[name], values) for name in peers
            }
            lines.append(
                {
                    "rollouts": f"{size} ({prompt} + {response} tokens)",
                    "side": side,
                    "rows/s": spread([count / s for s in values]),
                    "MB/s": short(megabytes / sorted(values)[len(values) // 2]),
                    "ours / pyarrow": "; ".join(f"{name} {spread(list(r.values()))}" for name, r in ratios.items()),
                }
            )
    report("replay", lines, {"measured": raw}, options.out)


if __name__ == "__main__":
    main()
