"""The ledger: the outcome of every prompt attempt of an RL stage, so that ``audit`` can prove that nothing was lost or
doubled.

    <run>/ledger/<stage>/updates-00000001-00000050-<sha8>.parquet  a row per prompt and attempt (``SCHEMA``), written
    before each checkpoint <run>/ledger/<stage>/_starts.jsonl                             a line per start of the stage:
    where it began <run>/ledger/<stage>/_undone/start-2/...                       parts of updates that start 2 went
    back behind, and did again

A part ends where a checkpoint stands, so going back to a checkpoint sets whole parts aside. The name carries the hash
of the bytes.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.runs.layout import LEDGER
from pipeline.storage import checksummed_jsonl
from pipeline.storage.atomic import fsync_file, fsync_folder, sha256_file, write_atomic

STARTS, UNDONE = "_starts.jsonl", "_undone"  # Parquet readers pass over names that begin with _
_METADATA = b"latent_control.ledger"
_NAME = re.compile(r"updates-([0-9]{8})-([0-9]{8})-([0-9a-f]{8})\.parquet")

Outcome = Literal["trained", "skipped", "tied", "passed", "lost", "stale"]
CONSUMED: tuple[Outcome, ...] = ("trained", "skipped")
"""Of what an update took."""
PLAYED: tuple[Outcome, ...] = (*CONSUMED, "tied")
"""Of what was sampled for an update, all of which is stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One prompt, handed to a worker once."""

    position: int
    """Place in the run's stream of prompts: the prompt's id within the run."""
    attempt: int
    """How many times it was handed out before; ``position`` and this are the attempt's id."""
    prompt_index: int
    outcome: Outcome
    """trained, skipped (its update was, the rollouts are in quarantine), tied (left out of the update, because all
    rewards were equal), passed (the curriculum did not ask for it), lost (with its worker) or stale (thrown away,
    requested again)."""
    reason: str = ""
    """Why, unless it was trained on."""
    update: int
    """The update it was consumed by (1 for the first), or in whose time it came to nothing."""
    request: int
    """Requests are what workers are handed: the prompts of one were sampled together, in the order of their rows."""
    worker: int
    oldest_version: int = -1
    newest_version: int = -1
    """Of the policies that chose its actions; -1 where none did."""
    rollouts: tuple[str, ...] = ()
    """Ids of its rollouts."""
    successes: int = -1
    """Of its rollouts; -1 where there are none, and in ledgers of earlier versions."""
    equal_rewards: bool = False
    """Whether all its rewards are equal."""


SCHEMA = pa.schema(
    [
        pa.field("position", pa.int64(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
        pa.field("prompt_index", pa.int64(), nullable=False),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("update", pa.int64(), nullable=False),
        pa.field("request", pa.int64(), nullable=False),
        pa.field("worker", pa.int32(), nullable=False),
        pa.field("oldest_version", pa.int64(), nullable=False),
        pa.field("newest_version", pa.int64(), nullable=False),
        pa.field("rollouts", pa.list_(pa.field("element", pa.string(), nullable=False)), nullable=False),
        pa.field("successes", pa.int32(), nullable=False),
        pa.field("equal_rewards", pa.bool_(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """The rows of updates ``first`` to ``last``."""

    first: int
    last: int
    attempts: tuple[Attempt, ...]
    policies: Mapping[int, str]
    """Hash of the weights of each policy version published in that time."""
    open: tuple[int, ...]
    """Positions asked for, and not trained on yet when the part was written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """What a ledger holds."""

    parts: tuple[Part, ...]
    starts: tuple[Mapping[str, Any], ...]
    problems: tuple[str, ...]
    """Parts that cannot be read or do not join up, a line each."""

    @property
    def attempts(self) -> list[Attempt]:
        """Of all parts, in order."""
        return [attempt for part in self.parts for attempt in part.attempts]

    @property
    def policies(self) -> dict[int, str]:
        """Hash of the weights by policy version."""
        return {version: found for part in self.parts for version, found in part.policies.items()}


class Ledger:
    """Writes the ledger of one stage. ``begin`` first, ``add`` as things happen, ``flush`` before every checkpoint."""

    def __init__(self, run_dir: Path, stage: str) -> None:
        self.folder = run_dir / LEDGER / stage
        self.pending: list[Attempt] = []
        self._flushed = 0

    def begin(self, version: int, skipped: Sequence[str] = (), *, reward_hash: str = "") -> str:
        """The stage starts at policy ``version``, past the checkpoints ``skipped``; rows of later updates are set
        aside. ``reward_hash`` names the definition that rewards follow from now on (task, verifier or judge, weights).

        Returns what was wrong with the list of earlier starts; "" when nothing was.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        starts, damaged = checksummed_jsonl.read(self.folder / STARTS)
        wrong = _starts_problem(self.folder, starts, damaged)
        if damaged:  # of these starts there is nothing left but that they were
            starts = [*starts, {"start": len(starts) + 1, "damaged_lines": len(damaged)}]
            write_atomic(self.folder / STARTS, "".join(map(checksummed_jsonl.line, starts)).encode())
        number = len(starts) + 1
        for unfinished in self.folder.glob(".updates-*"):
            unfinished.unlink()
        for path in _parts(self.folder):
            if int(path.name.split("-")[2]) > version:
                aside = self.folder / UNDONE / f"start-{number}"
                aside.mkdir(parents=True, exist_ok=True)
                os.replace(path, aside / path.name)
        line = {"start": number, "version": version, "time": round(time.time(), 3), "skipped": list(skipped)}
        line |= {"reward_hash": reward_hash} if reward_hash else {}
        with (self.folder / STARTS).open("a", encoding="utf-8") as file:
            file.write(checksummed_jsonl.line(line))
            file.flush()
            os.fsync(file.fileno())
        fsync_folder(self.folder)
        self.pending.clear()
        self._flushed = version
        return wrong

    def add(self, attempts: Sequence[Attempt]) -> None:
        """Record the outcome of attempts."""
        self.pending.extend(attempts)

    def flush(self, version: int, policies: Mapping[int, str], open_positions: Sequence[int]) -> None:
        """Put everything noted on the disk, as the part that ends with update ``version``."""
        if version == self._flushed:
            return
        columns = {name: [getattr(one, name) for one in self.pending] for name in SCHEMA.names}
        published = {str(v): digest for v, digest in policies.items() if self._flushed <= v <= version}
        about = {"first": self._flushed + 1, "last": version, "policies": published, "open": list(open_positions)}
        table = pa.table(columns, schema=SCHEMA).replace_schema_metadata({_METADATA: json.dumps(about)})
        staged = self.folder / f".updates-{version:08d}.tmp"
        pq.write_table(table, staged, compression="zstd", write_page_checksum=True)
        fsync_file(staged)
        name = f"updates-{self._flushed + 1:08d}-{version:08d}-{sha256_file(staged)[:8]}.parquet"
        os.replace(staged, self.folder / name)
        fsync_folder(self.folder)
        self.pending.clear()
        self._flushed = version


def read(run_dir: Path, stage: str) -> Recorded:
    """The ledger of a stage; whatever is wrong with it is listed, not raised."""
    folder = run_dir / LEDGER / stage
    parts: list[Part] = []
    problems: list[str] = []
    expected = 1
    for path in _parts(folder):
        match = _NAME.fullmatch(path.name)
        try:
            if match is None:
                raise ValueError("its name is not one the ledger gives")
            if not sha256_file(path).startswith(match[3]):
                raise ValueError("its bytes do not match the hash in its name")
            part = _read_part(path)
        except (OSError, ValueError, LookupError, TypeError) as error:
            problems.append(f"{path.name}: {error}")
            continue
        if part.first != expected:
            problems.append(f"{path.name}: the ledger goes on with update {part.first}, expected was {expected}")
        expected = part.last + 1
        parts.append(part)
    starts, damaged = checksummed_jsonl.read(folder / STARTS)
    wrong = _starts_problem(folder, starts, damaged)
    problems += [wrong] if wrong else []
    return Recorded(parts=tuple(parts), starts=tuple(starts), problems=tuple(problems))


def stages(run_dir: Path) -> list[str]:
    """The stages that have a ledger."""
    folder = run_dir / LEDGER
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _starts_problem(folder: Path, starts: Sequence[checksummed_jsonl.Record], damaged: Sequence[bytes]) -> str:
    if damaged:
        return f"{STARTS} has {len(damaged)} damaged lines, the first {damaged[0][:40]!r}"
    return f"{STARTS} is empty or missing, though there are parts" if _parts(folder) and not starts else ""


def _read_part(path: Path) -> Part:
    table = pq.read_table(path, page_checksum_verification=True)
    about = json.loads(table.schema.metadata[_METADATA])
    rows = [Attempt(**{**row, "rollouts": tuple(row["rollouts"])}) for row in table.to_pylist()]
    policies = {int(version): digest for version, digest in about["policies"].items()}
    return Part(
        first=about["first"], last=about["last"], attempts=tuple(rows), policies=policies, open=tuple(about["open"])
    )


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("updates-*.parquet"))
