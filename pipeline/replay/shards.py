"""Opens shards of the replay buffer: checks bytes, schema and origin, and quarantines what does not fit."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.replay.schema import MANIFEST, METADATA, OLDER, QUARANTINE, SCHEMA, SCHEMA_VERSION, SHARD_NAME
from pipeline.runs.layout import REPLAY
from pipeline.storage.atomic import sha256_file, unseal

_MOST_VALUES, _MOST_BYTES = 1 << 26, 1 << 33
"""Of a column in a row group, as it would be in memory."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Quarantined:
    """A shard that is not read. ``Quarantined(shard="run=a/part-00000003-1f00aa07.parquet", reason="...",
    moved_to=...)``."""

    shard: str
    """Path relative to the replay folder."""
    reason: str
    moved_to: Path | None
    """``None`` when it is gone, could not be moved, or was not to be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A shard that passed all checks."""

    path: Path
    entry: dict[str, Any]
    """Its entry in the manifest."""
    footer: pq.FileMetaData


def replay_root(folder: Path) -> Path:
    """The replay folder of a run folder, of itself, or of one of its partitions."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give a run folder or its replay folder")
    if (folder / REPLAY).is_dir():
        return folder / REPLAY
    return folder.parent if folder.name.startswith("run=") else folder


def open_all(root: Path, move_damaged: bool = True) -> tuple[list[Shard], list[Quarantined]]:
    """Every shard under a replay folder, in the order of names; files outside of the partitions are quarantined."""
    shards: list[Shard] = []
    quarantined: list[Quarantined] = []
    for path in sorted(root.glob("*.parquet")):
        why = "it is outside of the run=<id> folders: not written by this buffer"
        quarantined.append(_quarantine(root, path, why, move_damaged))
    for partition in sorted(path for path in root.glob("run=*") if path.is_dir()):
        good, bad = open_partition(root, partition, move_damaged)
        shards, quarantined = shards + good, quarantined + bad
    return shards, quarantined


def open_partition(root: Path, partition: Path, move_damaged: bool = True) -> tuple[list[Shard], list[Quarantined]]:
    """The valid shards of a partition, whether or not the manifest lists them yet, and those quarantined."""
    entries = _read_manifest(partition)
    shards, quarantined = [], []
    for path in sorted(partition.glob("[!._]*.parquet")):
        try:
            shards.append(verified(path, entries.pop(path.name, None), partition.name.removeprefix("run=")))
        except (ValueError, OSError) as error:
            entries.pop(path.name, None)
            quarantined.append(_quarantine(root, path, str(error), move_damaged))
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
    """Entries by name. Without the manifest only the full hashes are lost: file names and pages carry checksums too."""
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
    """The problems of a replay folder's manifests, one line each; without one, shards are checked by the 32 bits
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


def listed_shards(partition: Path) -> set[str]:
    """Names of the shards that a partition's manifest lists."""
    try:
        return {entry["name"] for entry in unseal(partition / MANIFEST)["shards"]}
    except (FileNotFoundError, ValueError):
        return set()


def lost_before(partition: Path) -> list[dict[str, str]]:
    """The lost shards that the manifest lists already."""
    try:
        return list(unseal(partition / MANIFEST)["lost"])
    except (FileNotFoundError, ValueError):
        return []


def verified(path: Path, entry: dict[str, Any] | None, run_id: str) -> Shard:
    """Check a shard's bytes, schema and origin; ``ValueError`` names what does not match."""
    match = SHARD_NAME.fullmatch(path.name)
    if match is None:
        raise ValueError("its name is not part-<number>-<hash>.parquet: not written by this buffer")
    digest = sha256_file(path)
    expected = entry["sha256"] if entry else match[2]
    if not digest.startswith(expected):
        raise ValueError(f"its SHA-256 is {digest[:12]}, written was {expected[:12]}: damaged after it was written")
    try:
        footer = pq.read_metadata(path)
        schema = footer.schema.to_arrow_schema()
        about = json.loads((schema.metadata or {}).get(METADATA, b"null"))
    except (pa.ArrowException, ValueError, OSError, RecursionError) as error:
        raise ValueError(f"it is not a readable Parquet file: {str(error).partition(chr(10))[0]}") from error
    _require_size(footer)
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


def _require_size(footer: pq.FileMetaData) -> None:
    """``ValueError`` where a row group would be huge in memory: runs and dictionaries make a few bytes any number of
    values."""
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        for column in (group.column(place) for place in range(group.num_columns)):
            copied = column.total_uncompressed_size if column.physical_type == "BYTE_ARRAY" else 1
            if column.num_values > _MOST_VALUES or column.num_values * copied > _MOST_BYTES:
                raise ValueError(
                    f"row group {number} has {column.num_values} values in {column.path_in_schema}, of up to {copied} "
                    "bytes each: this buffer writes no such shard"
                )


def _quarantine(root: Path, path: Path, reason: str, move: bool) -> Quarantined:
    """Move a shard to the quarantine and log a warning; its bytes are kept."""
    relative = path.relative_to(root)
    if not move:
        _LOG.warning("replay buffer %s: shard %s is not used: %s (left where it is)", root, relative, reason)
        return Quarantined(shard=str(relative), reason=reason, moved_to=None)
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


def read_column(shard: Shard, name: str) -> list[Any]:
    """One column of a shard as Python values."""
    with pq.ParquetFile(shard.path, metadata=shard.footer) as file:
        return file.read(columns=[name]).column(0).to_pylist()
