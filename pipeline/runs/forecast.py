"""Expected seconds of each stage: of the newest run with the same settings in the same folder, else from speeds that
were measured on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.loading import load_config
from configs.schema import RunConfig
from pipeline.console.progress import clock
from pipeline.runs.events import read_events
from pipeline.runs.layout import CONFIG, SUMMARY
from pipeline.runs.stage_table import EVALUATE, PAGES, STAGES, level_of, planned
from pipeline.runs.summary import read_summary

NEIGHBOURS = 5
"""Newest runs in the same folder that are searched."""
SECTIONS = {stage.name: stage.section.partition(".")[0] for stage in STAGES} | {
    EVALUATE: "evaluation",
    PAGES: "explorer",
}
"""Section of the config that each stage's time depends on."""
EVERYWHERE = ("base", "task", "reward", "rollout", "cluster")
"""What may make any stage slower."""


def expected_seconds(run_dir: Path, config: RunConfig) -> dict[str, float]:
    """Seconds of each stage that a run beside ``run_dir`` with the same section did in one go; newer runs win."""
    found: dict[str, float] = {}
    for folder in _neighbours(run_dir):
        try:
            other = load_config(folder / CONFIG, check_paths=False)
            took = _took(read_summary(folder))
        except (ValueError, OSError, RecursionError):
            continue  # what is damaged tells nothing
        if any(getattr(other, section) != getattr(config, section) for section in EVERYWHERE):
            continue
        if sum(event["kind"] == "started" for event in read_events(folder)) != 1:
            continue  # a resumed stage took longer than was noted
        for stage, seconds in took.items():
            section = SECTIONS.get(stage)
            if section is None or getattr(other, section) == getattr(config, section):
                found.setdefault(stage, seconds)
    return found


def _neighbours(run_dir: Path) -> list[Path]:
    """The newest run folders with a summary beside ``run_dir``."""
    if not run_dir.parent.is_dir():
        return []
    others = [
        path
        for path in run_dir.parent.iterdir()
        if path != run_dir and (path / SUMMARY).is_file() and (path / CONFIG).is_file()
    ]
    return sorted(others, key=lambda path: (path / SUMMARY).stat().st_mtime, reverse=True)[:NEIGHBOURS]


def _took(summary: Mapping[str, Any]) -> dict[str, float]:
    stages = {name: float(stage["seconds"]) for name, stage in summary.get("stages", {}).items()}
    return stages | {name: float(seconds) for name, seconds in summary.get("took", {}).items()}


# -- from measured speeds ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Measured seconds, e.g. ``Speeds(load=2.0, update={"actions": 0.1}, evaluation={"actions": 0.2},
    final={"actions": 0.3}, rollout=0.01, tokens=12.0, learn=0.1, cores=2)``."""

    load: float
    """Of loading the model once."""
    update: Mapping[str, float]
    """Of an update, by offline stage; those that could not be measured are left out."""
    evaluation: Mapping[str, float]
    """Of an evaluation on held-out sequences, by offline stage."""
    final: Mapping[str, float]
    """Of what is measured on them at its end alone, by offline stage."""
    rollout: float
    """Of a rollout in one worker, the others at rest."""
    tokens: float
    """Of a rollout; no time."""
    learn: float
    """Of the policy's forward and backward passes in an update of reinforcement learning."""
    cores: int
    busy: float = 1.0
    """Wall seconds per second as above while it was measured: more than 1 where other processes had the cores."""


AROUND_STAGE = 1.0
"""Seconds of an offline stage beside loading, updates and evaluations: data, tokenizer, saving."""
START = 12.0
"""Seconds of a stage on Ray beside its work: Ray and its workers start, and end."""
AROUND = 0.15
"""Seconds of an update of reinforcement learning beside decoding and learning: verifier, batch, replay buffer,
publishing (``benchmarks/rllib_overhead.py``)."""
BY_TOKEN = 2.0
"""Cost of a rollout that is greedy by token, relative to by code (docs/evaluation.md)."""
WRITING, REPORTING = 12.0, 0.2
"""Seconds of report and explorer beside ``explorer.seconds``; of a report alone."""
BUSY = 1.5
"""``Speeds.busy`` from which it is said."""


def from_speeds(config: RunConfig, speeds: Speeds) -> dict[str, float]:
    """Seconds of each stage that can be told from ``speeds``, in order."""
    found = {}
    for stage in planned(config):
        settings = stage.settings(config)
        if stage.name in speeds.update:
            evaluations = max(1, -(-settings.updates // settings.evaluate_every))
            work = settings.updates * speeds.update[stage.name] + evaluations * speeds.evaluation[stage.name]
            found[stage.name] = speeds.load + AROUND_STAGE + work / settings.num_workers + speeds.final[stage.name]
            found[stage.name] += START * (settings.num_workers > 1)
        elif stage.online and level_of(config, stage.name) == "latent":
            found[stage.name] = _improve(config, speeds)
    if config.evaluation is not None:
        found[EVALUATE] = START + _evaluation(config, speeds)
    return found | pages_seconds(config)


def pages_seconds(config: RunConfig) -> dict[str, float]:
    """Of report and explorer, as the config bounds them; nothing where there are none."""
    if config.explorer.enabled:
        return {PAGES: WRITING + config.explorer.seconds}
    return {PAGES: REPORTING} if config.report.enabled else {}


def evaluation_rollouts(config: RunConfig) -> float:
    """Rollouts of the evaluation; what costs more is counted as so many by code."""
    if config.evaluation is None:
        return 0.0
    latent = len({stage.variant for stage in planned(config) if stage.variant and stage.policy})
    passes = (1 + latent) * (config.evaluation.samples_per_prompt + 1) + latent * BY_TOKEN
    return config.evaluation.prompts * passes


def unknown_stages(config: RunConfig, seconds: Mapping[str, float]) -> list[str]:
    """Stages of the config without a number in ``seconds``."""
    return [stage.name for stage in planned(config) if stage.name not in seconds]


def _sampling(config: RunConfig, speeds: Speeds, rollouts: float) -> float:
    """Seconds for rollouts on all workers: more threads than cores gain nothing."""
    workers = config.rollout.num_workers
    at_once = min(workers, max(1.0, speeds.cores / config.rollout.torch_threads))
    return rollouts * speeds.rollout / at_once


def _improve(config: RunConfig, speeds: Speeds) -> float:
    improve = config.improve
    assert improve is not None
    sampling = _sampling(config, speeds, improve.prompts_per_update * improve.group_size)
    learning = speeds.learn + AROUND
    update = max(sampling, learning) if improve.mode == "async" else sampling + learning
    looks = improve.updates // improve.evaluate_every if improve.evaluate_every else 0
    return (
        START + speeds.load + improve.updates * update + looks * _sampling(config, speeds, 2 * improve.evaluate_prompts)
    )


def _evaluation(config: RunConfig, speeds: Speeds) -> float:
    """Every variant loaded, sampled and greedy, a latent policy also greedy by token; their texts."""
    settings = config.evaluation
    assert settings is not None
    latent = len({stage.variant for stage in planned(config) if stage.variant and stage.policy})
    texts = sum(
        (speeds.evaluation[stage.name] + speeds.final[stage.name])
        * settings.marginal_sequences
        / stage.settings(config).evaluation_sequences
        for stage in planned(config)
        if stage.name in speeds.final
    )
    return _sampling(config, speeds, evaluation_rollouts(config)) + (1 + latent) * speeds.load + latent * texts


def lines(config: RunConfig, seconds: Mapping[str, float], busy: float) -> Iterator[str]:
    """A forecast in words: each stage, and all of them together; that others are at work where the machine is
    ``busy``."""
    for name, value in seconds.items():
        yield f"{name:9} {clock(value)}"
    unknown = unknown_stages(config, seconds)
    without = f" without {', '.join(unknown)}, which cannot be told before" if unknown else ""
    others = f"; other processes are at work now: {busy:.1f} times as long beside them" if busy > BUSY else ""
    yield f"{'in all':9} {clock(sum(seconds.values()))}{without}{others}"
