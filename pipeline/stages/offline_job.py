"""An offline stage as plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema import Actions, RunConfig, Training
from latent_control.pretrained import CONFIG, read_config
from pipeline.storage import checkpoints
from pipeline.tracking.provenance import circumstances

Log = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class OfflineJob:
    """An offline stage as plain data, so that it can be sent to Ray Train workers."""

    stage: str
    config: RunConfig
    settings: Training
    source: str | None
    """Checkpoint of the stage before, or ``actions.init``; ``None`` starts new modules beside the base LM."""
    base: str
    checkpoints: str

    @property
    def result(self) -> Path:
        """Folder of the final checkpoint."""
        return Path(self.checkpoints) / self.stage

    def circumstances(self, update: int) -> dict[str, Any]:
        """For the manifest of a checkpoint."""
        return circumstances(self.config, Path(self.checkpoints).parent, self.stage, update)


def updates_done(job: OfflineJob, say: Callable[[str], None] = lambda _: None) -> int:
    """Updates that the newest valid checkpoint has behind it."""
    found, skipped = checkpoints.newest_valid(Path(job.checkpoints), job.stage)
    for reason in skipped:
        say(f"skipped checkpoint {reason}")
    return 0 if found is None else int(found.name.rsplit("-", 1)[1])


def passes_on(settings: Training) -> bool:
    """Whether a stage only hands on ``actions.init``: a checkpoint for inference (an export, a bank's world), which
    has no inverse dynamics model to measure it by."""
    if not isinstance(settings, Actions) or settings.init is None or settings.updates:
        return False
    folder = Path(settings.init)
    return (folder / CONFIG).is_file() and not read_config(folder)["inverse_dynamics"]
