"""``train-q``: a Q head from a run's replay buffer, as a separate checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.loading import load_config
from configs.schema import DataSource, RunConfig
from latent_control.distributions import rollout_seed
from latent_control.model import LatentActionLM
from latent_control.pretrained import base_hash, world_hash
from latent_control.search.q_head import QHead, QShape, best_supported, save_q_head
from learners.features import FeatureCache
from learners.q_head import QLearner, QSettings, Transitions, transitions
from pipeline.evaluation.statistics import auc
from pipeline.replay.dataset import StoredRollouts, read_rollouts
from pipeline.runs.layout import CONFIG as RUN_CONFIG
from pipeline.runs.layout import METRICS
from pipeline.runs.policies import checkpoint_of
from pipeline.storage import checkpoints
from pipeline.tracking.tracker import Tracker

NAME = "q_head"


def train_q(run_dir: Path, out: Path, settings: QSettings, *, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Train on the rollouts of ``run_dir`` and write the checkpoint ``out``.

    Raises:
        ValueError: no rollouts, or too few prompts to hold some out.
    """
    started = time.perf_counter()
    config = load_config(run_dir / RUN_CONFIG, [], check_paths=False)
    checkpoint = checkpoint_of(run_dir)[0]
    model = LatentActionLM.from_pretrained(
        checkpoint, dtype=config.base.dtype, trust_remote_code=config.base.trust_remote_code
    )
    training, held = split(model, run_dir, settings)
    head = new_head(model, settings, seed)
    cache = FeatureCache(model, settings.cache_megabytes)
    learner, lines = (
        QLearner(head, settings, (min(0.0, float(training.rewards.min())), float(training.rewards.max()))),
        [],
    )
    for update, rows in enumerate(draws(len(training), settings, seed), start=1):
        metrics = learner.update(choices(model, cache, training, rows, settings.support))
        if update % settings.evaluate_every == 0 or update == settings.updates:
            lines.append(
                {"update": update}
                | {name: float(value) for name, value in metrics.items()}
                | measures(model, head, held)
            )
            say(" ".join(f"{name}={value:.4g}" for name, value in lines[-1].items() if value is not None))
    result = {
        "checkpoint": str(out),
        "run": run_dir.name,
        "rollouts": len(training),
        "heldout_rollouts": len(held),
        "base_passes": cache.computed,
        "seconds": time.perf_counter() - started,
        "settings": asdict(settings) | {"seed": seed},
        "measures": lines[-1],
    }
    write(out, head, lines, result)
    track(lines, result, config, run_dir)
    return result


def track(lines: list[dict[str, Any]], result: dict[str, Any], config: RunConfig, run_dir: Path) -> None:
    """The run ``q_head`` in MLflow, when the run is tracked."""
    tracker = Tracker(config.tracking, run_dir, group=run_dir.name)
    tracker.start(NAME, params=result["settings"], tags={"algorithm": "double_dqn"})
    for line in lines:
        tracker.log({key: value for key, value in line.items() if value is not None}, line["update"])
    tracker.finish("FINISHED")
    tracker.close()


def split(model: LatentActionLM, run_dir: Path, settings: QSettings) -> tuple[StoredRollouts, StoredRollouts]:
    """(training, held out) of a run's rollouts, by prompts."""
    found = read_rollouts([DataSource(kind="replay", path=str(run_dir))], world=world_hash(model))
    training, held = found.split(settings.heldout_share)
    if not len(training) or not len(held):
        raise ValueError(
            f"{len(found)} rollouts of {len(found.prompt_ids)} prompts in {run_dir} leave nothing to train on or "
            "nothing to measure with "
            f"a heldout_share of {settings.heldout_share}: change it, or give a run with more prompts"
        )
    return training, held


def new_head(model: LatentActionLM, settings: QSettings, seed: int) -> QHead:
    """A Q head for a model's base and codes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = QShape(
            width=model.config.state_width(model.base.width),
            hidden=settings.hidden,
            num_actions=model.config.num_actions,
            span=model.config.span,
            reads=model.config.policy_state,
            late_blocks=model.config.late_blocks,
            support=settings.support,
            world_hash=world_hash(model),
            base_hash=base_hash(model),
        )
        return QHead(shape)


def draws(count: int, settings: QSettings, seed: int) -> Iterator[np.ndarray]:
    """The rollouts of each update, drawn with replacement: a function of (seed, update)."""
    for update in range(settings.updates):
        yield np.random.default_rng(rollout_seed(seed, update, 1)).integers(0, count, settings.batch_size)


@torch.no_grad()
def choices(
    model: LatentActionLM, cache: FeatureCache, rollouts: StoredRollouts, rows: np.ndarray, share: float
) -> Transitions:
    """The transitions of rollouts ``rows``."""
    batch = rollouts.batch(rows)
    return transitions(model, cache(batch), batch, torch.from_numpy(rollouts.rewards[rows]), share)


@torch.no_grad()
def measures(model: LatentActionLM, head: QHead, held: StoredRollouts) -> dict[str, Any]:
    """AUC of Q against success on held-out prompts, and how far it is off.

    ``auc_first``, ``auc_middle``, ``auc_last``: of max_a Q at the first, middle and last choice of a rollout;
    ``auc_taken``: of Q of the last code taken, by which ``search --value q`` ranks whole responses. ``bias_taken``:
    mean of that minus the reward.
    """
    cache = FeatureCache(model, 0.0)
    found = np.zeros((4, len(held)))
    for rows, batch in held.batches():
        some = transitions(model, cache(batch), batch, torch.from_numpy(held.rewards[rows]), head.shape.support)
        q = head(some.states)
        ends = some.last.nonzero()[:, 0]
        starts = torch.cat([ends.new_zeros(1), ends[:-1] + 1])
        best, taken = best_supported(q, some.support), q.gather(-1, some.actions[:, None])[:, 0]
        found[:, rows] = torch.stack([best[starts], best[(starts + ends) // 2], best[ends], taken[ends]]).numpy()
    names = ("auc_first", "auc_middle", "auc_last", "auc_taken")
    areas = {name: auc(scores, held.success) for name, scores in zip(names, found, strict=True)}
    return areas | {"bias_taken": float((found[3] - held.rewards).mean())}


def write(out: Path, head: QHead, lines: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """The checkpoint: weights, shape, the log."""

    def files(folder: Path) -> None:
        save_q_head(head, folder)
        (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))

    checkpoints.write(out, files=files, info={"stage": NAME} | {k: v for k, v in result.items() if k != "checkpoint"})
