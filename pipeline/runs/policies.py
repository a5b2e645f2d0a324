"""The last policy of a run: which of its checkpoints is exported, served, steered, searched with and judged."""

from __future__ import annotations

from pathlib import Path

from configs.loading import load_config
from pipeline.runs.layout import CHECKPOINTS, CONFIG
from pipeline.runs.stage_table import policy_stages


def checkpoint_of(target: Path) -> tuple[Path, Path]:
    """(checkpoint, its run folder) of a checkpoint inside a run, or of a run: then its last policy.

    Raises:
        ValueError: there is none.
    """
    if not (target / CONFIG).is_file():
        run_dir = target.parent.parent
        if not (run_dir / CONFIG).is_file():
            raise ValueError(f"{target} is neither a run folder nor a checkpoint inside one (RUN/checkpoints/STAGE)")
        return target, run_dir
    stages = policy_stages(load_config(target / CONFIG, [], check_paths=False))
    there = [folder for stage in stages if (folder := target / CHECKPOINTS / stage).is_dir()]
    if not there:
        raise ValueError(f"{target} has no finished policy; wait for one of the stages {', '.join(stages)}")
    return there[0], target
