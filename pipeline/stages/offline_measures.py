"""Held-out measures of an offline stage, and the guard against a collapsed codebook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from configs.schema import Actions, Clone, Finetune, ImproveOffline, RunConfig, Training
from latent_control.analysis.measures import codebook_measures, marginal_measures, reach_measures
from latent_control.model import LatentActionLM
from latent_control.off_policy import RECOMMENDED, off_policy_report
from latent_control.records import TokenBatch
from learners.offline_training import OfflineStage
from learners.sharding import gathered
from pipeline.replay.dataset import logged
from pipeline.runs.errors import NeedsNewRun
from pipeline.runs.stage_table import TOKEN_SFT
from pipeline.stages.offline_job import OfflineJob


def measure(job: OfflineJob, stage: OfflineStage, heldout: list[Any], update: int) -> dict[str, float]:
    """Held-out measures of a stage; the costly ones at its end only.

    Raises:
        ValueError: the codebook has collapsed (stage ``actions``).
    """
    with gathered(stage):
        return measure_whole(job, stage.model, heldout, update)


def measure_whole(job: OfflineJob, model: LatentActionLM, heldout: list[Any], update: int) -> dict[str, float]:
    """``measure`` of a model whose tensors are all there."""
    if isinstance(job.settings, ImproveOffline):
        return measure_rollouts(job.config, model, heldout)
    found = codebook_measures(model, heldout)
    final, codes = update == job.settings.updates, job.stage != TOKEN_SFT
    if not codes:
        found = {"nll": found["nll_base"]}
    if isinstance(job.settings, Actions):
        guard_codebook(job.settings, found, update, tokens_in_use(heldout))
    if final:
        found |= final_measures(job, model, heldout) if codes else {}
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad) if update else 0
        found["parameters_trained"] = float(trained)
    return found


def final_measures(job: OfflineJob, model: LatentActionLM, heldout: list[Any]) -> dict[str, float]:
    """What a stage with codes measures at its end alone: it costs the language head for every code."""
    if isinstance(job.settings, Actions):
        return reach_measures(model, heldout)
    if rows := marginal_rows(job.config, job.settings):
        return marginal_measures(model, heldout[: -(-rows // len(heldout[0].input_ids))])
    return {}


def marginal_rows(config: RunConfig, settings: Training) -> int:
    """Held-out sequences on which a stage's codes are summed out at its end."""
    if not isinstance(settings, Clone | Finetune) or config.evaluation is None:
        return 0
    return min(settings.evaluation_sequences, config.evaluation.marginal_sequences)


def measure_rollouts(config: RunConfig, model: LatentActionLM, heldout: list[Any]) -> dict[str, float]:
    """What the policy would earn on the held-out prompts, estimated from their rollouts; ``effective`` of them
    count."""
    if not heldout or len(heldout[0].prompt_ids) < 2:
        return {}
    report = off_policy_report(logged(model, heldout[0], config.rollout), draws=200)
    return {
        "estimated_reward": report.estimates[RECOMMENDED].value,
        "effective": report.effective,
        "replay_reward": report.behaviour.value,
    }


def tokens_in_use(batches: Sequence[TokenBatch]) -> int:
    """Different tokens of the responses."""
    return len(torch.cat([batch.input_ids[:, 1:][batch.response_mask[:, 1:]] for batch in batches]).unique())


def guard_codebook(settings: Training, found: dict[str, float], update: int, tokens: int) -> None:
    """Stop a run whose codebook has collapsed, before it wastes the later stages: of the codes that ``tokens`` tokens
    in use can keep active, one each, too few are, or but one."""
    assert isinstance(settings, Actions)
    useful, alive = min(settings.num_actions, tokens), found["inverse_dynamics_alive_codes"]
    least = min(useful, max(2, settings.min_alive_share * useful)) if settings.min_alive_share else 0
    if update < settings.anneal_share * settings.updates or alive >= least:
        return
    weight, fewer = max(0.2, 4 * settings.usage_weight), max(2, useful)
    raise NeedsNewRun(
        f"the codebook has collapsed: {alive:.0f} of {settings.num_actions} codes are active after {update} updates, "
        f"where the data use {tokens} different tokens (actions.min_alive_share is {settings.min_alive_share}). Raise "
        f"actions.usage_weight (now {settings.usage_weight}), start with a higher actions.temperature (now "
        f"{settings.temperature}), or ask for fewer codes (actions.num_actions)",
        f"actions.usage_weight={weight:g} actions.num_actions={fewer}",
    )
