"""A run in Python: its config, curves, evaluation, rollouts and models, read when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.loading import load_config
from configs.paths import nothing_at
from configs.schema import RunConfig
from pipeline.console.progress import clock
from pipeline.evaluation.modes import MODES
from pipeline.runs.layout import CONFIG, METRICS, REPLAY, SUMMARY
from pipeline.runs.metrics_log import records
from pipeline.runs.stage_table import LATENT_STAGES
from pipeline.runs.status import Overview, overview

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

    from latent_control.model import LatentActionLM

_NOT_METRICS = ("stage", "step", "time", "crc32")


class Run:
    """A run folder. ``open_run("runs/first").metrics("improve").reward.plot()``

    Nothing is kept open or locked: a run at work is read again at each call.
    """

    def __init__(self, folder: str | Path) -> None:
        """``ValueError`` when ``folder`` is not a run folder."""
        self.folder = Path(folder).absolute()
        if not self.folder.is_dir():
            raise ValueError(nothing_at(self.folder))
        if not (self.folder / CONFIG).is_file():
            raise ValueError(
                f"{self.folder} is not a run folder: it has no {CONFIG}; runs are in runs/ unless --run-dir was given"
            )

    @cached_property
    def config(self) -> RunConfig:
        """The config, all defaults filled in."""
        return load_config(self.folder / CONFIG, check_paths=False)

    @property
    def overview(self) -> Overview:
        """Status, stage, step, reward, success at a glance."""
        return overview(self.folder)

    @property
    def summary(self) -> Mapping[str, Any]:
        """``summary.json``: seconds, checkpoint and last metrics of each stage, the evaluation; empty before the first
        stage is done."""
        path = self.folder / SUMMARY
        found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return found

    @property
    def evaluation(self) -> Mapping[str, Any]:
        """Of each variant on held-out prompts, and the differences; empty before it is done."""
        found: Mapping[str, Any] = self.summary.get("evaluation") or {}
        return found

    def steps(self, stage: str | None = None) -> list[dict[str, Any]]:
        """The logged steps as dicts (``stage``, ``step``, ``time`` and the metrics), of all stages or one.

        Raises:
            ValueError: nothing was logged by a stage of that name.
        """
        every = [dict(record) for record in records(self.folder / METRICS)]
        found = [record for record in every if stage in (None, record.get("stage"))]
        if stage is not None and not found:
            there = ", ".join(dict.fromkeys(str(record.get("stage")) for record in every)) or "nothing yet"
            raise ValueError(f"stage {stage!r} logged nothing in {self.folder.name}; these did: {there}")
        return found

    def metrics(self, stage: str | None = None) -> pd.DataFrame:
        """``steps`` as a table, the step its index where one stage is asked for."""
        import pandas as pd

        frame = pd.DataFrame(self.steps(stage))
        return (
            frame if stage is None else frame.drop(columns="stage").set_index("step").dropna(axis="columns", how="all")
        )

    def rollouts(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """The replay buffer, one row per rollout (columns: ``pipeline.replay.schema.SCHEMA``), oldest policy first.

        Raises:
            ValueError: there is no such column, or the run stored no rollouts.
        """
        import pandas as pd

        from pipeline.replay.reader import ReplayReader
        from pipeline.replay.schema import SCHEMA

        if not (self.folder / REPLAY).is_dir():
            raise ValueError(
                f"{self.folder.name} stored no rollouts: it has not reached reinforcement learning, or replay.enabled "
                "is false"
            )
        wanted = list(columns) if columns is not None else SCHEMA.names
        reader = ReplayReader(self.folder, shuffle=False, columns=list(dict.fromkeys([*wanted, "policy_version"])))
        frames = [batch.to_pandas() for batch in reader.batches()]
        if not frames:
            return pd.DataFrame(columns=wanted)
        return pd.concat(frames, ignore_index=True).sort_values("policy_version", kind="stable", ignore_index=True)[
            wanted
        ]

    @property
    def checkpoints(self) -> dict[str, Path]:
        """The result of each finished stage."""
        stages = self.summary.get("stages", {})
        return {name: (self.folder / stage["checkpoint"]).resolve() for name, stage in stages.items()}

    def model(self, stage: str | None = None) -> LatentActionLM:
        """The model after ``stage``; the last one of the run when it is left out.

        Raises:
            ValueError: that stage is not done, or has no latent policy.
        """
        from latent_control.model import LatentActionLM

        done = [name for name in LATENT_STAGES if name in self.checkpoints]
        if stage is None and not done:
            raise ValueError(f"{self.folder.name} has no latent policy yet: latent-control show {self.folder}")
        if stage is not None and stage not in done:
            raise ValueError(
                f"no latent policy after stage {stage!r}; this run has: {', '.join(reversed(done)) or 'none yet'}"
            )
        source = self.checkpoints[stage or done[0]]
        return LatentActionLM.from_pretrained(
            source, dtype=self.config.base.dtype, trust_remote_code=self.config.base.trust_remote_code
        )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the base LM.

        Raises:
            ValueError: no stage is done.
        """
        from latent_control.bases.adapters import sources_of
        from latent_control.pretrained import tokenizer_path
        from latent_control.text import load_tokenizer

        stage = next((name for name in LATENT_STAGES if name in self.checkpoints), None)
        source = sources_of(self.config.base.model)[1] if stage is None else tokenizer_path(self.checkpoints[stage])
        return load_tokenizer(source, trust_remote_code=self.config.base.trust_remote_code)

    def rows(self) -> list[tuple[str, str]]:
        """The run in words: name and value."""
        found = self.overview
        where = (
            f"{found.status}, {found.stage} {found.step}/{found.total}"
            if found.total and found.status != "finished"
            else found.status
        )
        results = [
            (name, f"success {', '.join(f'{row[m]:.3f} {MODES[m]}' for m in MODES if m in row)}")
            for name, row in self.evaluation.items()
            if isinstance(row, dict) and "greedy" in row
        ]
        took = {name: clock(stage["seconds"]) for name, stage in self.summary.get("stages", {}).items()}
        return [
            ("status", where),
            ("task", f"{self.config.task.name}, base LM {self.config.base.model}"),
            ("stages done", ", ".join(f"{name} {seconds}" for name, seconds in took.items()) or "none"),
            *results,
        ]

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}\n" + "\n".join(f"  {name}: {value}" for name, value in self.rows()) + "\n)"

    def _repr_html_(self) -> str:
        from latent_control.notebook_views import table

        return table(f"Run {self.folder.name}", self.rows())
