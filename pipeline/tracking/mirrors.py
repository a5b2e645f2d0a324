"""Mirrors of ``metrics.jsonl`` in other viewers: TensorBoard's event files, and Weights & Biases. One that fails is
left off with an event; it never fails the run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from configs.redaction import without_secrets
from configs.schema import Tracking
from pipeline.runs.layout import TENSORBOARD


class MirrorFailedError(RuntimeError):
    """A viewer cannot take metrics."""


class Mirror(Protocol):
    """The seam: what a viewer has to offer."""

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Take a step's finite numbers, named ``<stage>/<metric>``."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Event files in the run folder, which TensorBoard reads (RUN/tensorboard)."""

    def __init__(self, run_dir: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / TENSORBOARD))

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """As ``Mirror`` says."""
        for name, value in metrics.items():
            self._writer.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        """As ``Mirror`` says."""
        self._writer.close()


class WeightsAndBiases:
    """A run of a project, continued after a restart; ``WANDB_MODE=offline`` keeps it in the run folder (RUN/wandb)."""

    def __init__(self, project: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=project,
            name=run_dir.name,
            id=hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(run_dir),
            config=dict(config),
            # Metrics are all that leaves this machine, and the terminal is the run's own.
            settings=wandb.Settings(console="off", silent=True, save_code=False, disable_git=True),
        )

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """As ``Mirror`` says; a stage's own steps are its x axis, as W&B's may not go back."""
        self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log({f"{stage}/{name}": value for name, value in metrics.items()} | {f"{stage}/step": step})

    def close(self) -> None:
        """As ``Mirror`` says."""
        self._run.finish()


class Mirrors:
    """The mirrors that a config asks for."""

    def __init__(
        self, settings: Tracking, run_dir: Path, config: Mapping[str, Any], note: Callable[[str, str], None]
    ) -> None:
        self._note = note
        self._kept: dict[str, Mirror] = {}
        wanted: dict[str, Callable[[], Mirror]] = {}
        if settings.tensorboard:
            wanted["TensorBoard"] = lambda: TensorBoard(run_dir)
        if (project := settings.wandb) is not None:
            wanted["Weights & Biases"] = lambda: WeightsAndBiases(project, run_dir, config)
        for name, make in wanted.items():
            self._try(name, partial(self._keep, name, make))

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Pass a step on."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for name, mirror in list(self._kept.items()):
            self._try(name, partial(mirror.log, stage, step, finite))

    def close(self) -> None:
        """Write what is left."""
        for name, mirror in list(self._kept.items()):
            self._try(name, mirror.close)

    def _keep(self, name: str, make: Callable[[], Mirror]) -> None:
        self._kept[name] = make()

    def _try(self, name: str, work: Callable[[], object]) -> None:
        try:
            _attempt(work)
        except MirrorFailedError as error:
            self._kept.pop(name, None)
            self._note("mirror_lost", without_secrets(f"{name} gets no more metrics ({error})"))


def _attempt(work: Callable[[], object]) -> None:
    try:
        work()
    except Exception as error:  # viewers have no common class of errors
        hint = f"; pip install {error.name}" if isinstance(error, ModuleNotFoundError) else ""
        raise MirrorFailedError(f"{error}{hint}") from error
