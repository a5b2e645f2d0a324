"""Published data sets in local copies: which files hold a split, and that none of them is missing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

SUFFIXES = (".jsonl", ".parquet", ".json")
SUBJECTS = frozenset(
    "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus".split()
)
"""Folders of MATH, each with its own files."""
_SHARD = re.compile(r"(.*?)-?(\d{2,})-of-(\d{2,})(.*)")


def split_files(path: Path, split: str) -> list[Path]:
    """All files of a split: the file itself; or of a folder those named after the split (``test.jsonl``,
    ``test-00000-of-00002.parquet``) or in a folder so named.

    Raises:
        ValueError: there is none; a shard or a subject of MATH is missing; the split is there more than once.
    """
    if path.is_file():
        require_shards([path])
        return [path]
    files = [f for f in sorted(path.rglob("*")) if f.suffix in SUFFIXES and f.is_file()]
    # GSM8K's other configuration, in a folder beside the main one
    files = [f for f in files if "socratic" not in f.parts]
    named = re.compile(rf"{split}(-\d.*)?")
    found = [f for f in files if named.fullmatch(f.stem) or split in f.relative_to(path).parts[:-1]]
    if not found:
        raise ValueError(
            f"task.options.path: {path} holds no {split}.jsonl or {split}-*.parquet; give the folder of a local copy"
        )
    require_shards(found)
    folders = sorted({f.parent for f in found})
    subjects = {part for f in found for part in f.relative_to(path).parts if part in SUBJECTS}
    if subjects and (missing := sorted(SUBJECTS - subjects)):
        raise ValueError(
            f"task.options: {path} holds {len(subjects)} of MATH's {len(SUBJECTS)} subjects for {split}; "
            f"{', '.join(missing)} missing: copy it whole, or give the folder of one subject"
        )
    if len({f.suffix for f in found}) > 1 or len(folders) > max(1, len(subjects)):
        raise ValueError(
            f"task.options: {path} holds {split} more than once ({found[0]}, {found[-1]}); give the folder of one copy"
        )
    return found


def require_shards(files: Sequence[Path]) -> None:
    """``ValueError`` names the shards that ``NAME-00000-of-00005`` files lack."""
    series: dict[tuple[Path, str, str], set[int]] = {}
    for file in files:
        if shard := _SHARD.fullmatch(file.name):
            series.setdefault((file.parent, shard[1], shard[3]), set()).add(int(shard[2]))
    for (folder, name, of), numbers in series.items():
        missing = [f"{name}-{n:0{len(of)}}-of-{of}" for n in range(int(of)) if n not in numbers]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(
                f"{folder} lacks {', '.join(missing[:3])}{more} of {int(of)} shards; copy them, and give the folder"
            )
