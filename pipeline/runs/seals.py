"""When the hashes of a run's files are recorded: of a checkpoint when it is saved, of a stage's files when it ends."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from pipeline.runs import manifest
from pipeline.runs.layout import CHECKPOINTS, LEDGER, MANIFEST, QUARANTINE, REPLAY
from pipeline.storage import checkpoints


def patterns(stage: str) -> tuple[str, ...]:
    """What a finished stage leaves, within the run folder; checkpoints and partitions by their manifests."""
    return (
        f"{CHECKPOINTS}/{stage}/{MANIFEST}",
        f"{CHECKPOINTS}/{stage}_best/{MANIFEST}",
        f"{LEDGER}/{stage}/*",
        f"{REPLAY}/run=*-{stage}/_*.json",
        f"{QUARANTINE}/run=*-{stage}/_*.json",
    )


def stage_begins(run_dir: Path, stage: str) -> None:
    """Forget what an earlier start recorded of a stage that is done again."""
    old = patterns(stage)
    manifest.know(run_dir, (), forget=lambda name: any(fnmatch(name, pattern) for pattern in old))


def saved(run_dir: Path, stage: str, keep: int) -> None:
    """Record the ``keep`` newest checkpoints of a stage, and delete those before them."""
    root = run_dir / CHECKPOINTS
    doomed = checkpoints.surplus(root, stage, keep)
    kept = [folder for folder in checkpoints.checkpoints(root, stage) if folder not in doomed]
    names = [f"{CHECKPOINTS}/{folder.name}/{MANIFEST}" for folder in kept if (folder / MANIFEST).is_file()]
    manifest.know(run_dir, names, forget=lambda name: fnmatch(name, f"{CHECKPOINTS}/{stage}-[0-9]*"))
    checkpoints.delete(doomed)


def stage_ended(run_dir: Path, stage: str, base: Path) -> None:
    """Record what a stage left, and the files of a base LM in a local folder ``base``."""
    known = manifest.known(run_dir)
    own = [path for pattern in patterns(stage) for path in run_dir.glob(pattern) if path.is_file()]
    names = [path.relative_to(run_dir).as_posix() for path in own]
    outside = sorted(base.absolute().glob("[!.]*")) if base.is_dir() else []
    names += [str(path) for path in outside if path.is_file() and str(path) not in known]
    manifest.know(run_dir, names)


def unrecorded(run_dir: Path, stages: list[str]) -> list[str]:
    """What is there of these finished stages, and of the logs, without a recorded hash: made by a version before."""
    known = manifest.known(run_dir)
    results = [f"{CHECKPOINTS}/{stage}/{MANIFEST}" for stage in stages]
    wanted = [name for name in results if (run_dir / name).parent.is_dir()]
    wanted += [name for name in manifest.LOGS if (run_dir / name).is_file()] if stages else []
    return [name.removesuffix(f"/{MANIFEST}") for name in wanted if name not in known]
