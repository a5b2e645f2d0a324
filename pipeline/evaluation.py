"""Evaluation: the same held-out prompts played by the base LM and by each stage's result, sampled and greedy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ray.rllib.env.env_runner_group import EnvRunnerGroup

from configs.schema import RunConfig
from latent_control.distributions import rollout_seed
from latent_control.persistence import CONFIG, base_path
from pipeline.algorithm import workers_config
from pipeline.bases import resolve_base
from pipeline.cluster import connected
from pipeline.improve import TOKEN_INFO, TOKEN_POLICY
from pipeline.pool import RolloutPool
from pipeline.requests import chunks
from rollout_workers.episodes import HostSpec, RolloutRequest
from rollout_workers.hosting import WorkerSettings

PROMPTS_PER_REQUEST = 64


def variants(config: RunConfig, stages: Mapping[str, Path]) -> dict[str, HostSpec]:
    """What there is to evaluate, by name, given the finished stages' checkpoints."""
    common: dict[str, Any] = {"dtype": config.base.dtype, "trust_remote_code": config.base.trust_remote_code}
    found: dict[str, HostSpec] = {}
    for name, stage in (
        ("cloned", "clone"),
        ("finetuned", "finetune"),
        ("finetuned", "reclone"),
        ("offline", "improve_offline"),
        ("improved", "improve"),
        ("token_level", "token_level"),
    ):
        if stage in stages:
            found[name] = checkpoint_host(stages[stage], common)
    if "improved" in found and found["improved"].level == "token":
        found["token_level"] = found["improved"]
    return {"base": HostSpec(level="base", checkpoint=first_base(config, stages), **common), **found}


def first_base(config: RunConfig, stages: Mapping[str, Path]) -> str:
    """The base LM before any fine-tuning."""
    for stage in ("actions", "clone"):
        if stage in stages:
            return base_path(stages[stage])
    return resolve_base(config)


def checkpoint_host(folder: Path, common: dict[str, Any]) -> HostSpec:
    """How a worker hosts a checkpoint of either level.

    Raises:
        ValueError: it is neither.
    """
    if (folder / CONFIG).is_file():
        return HostSpec(level="latent", checkpoint=str(folder), **common)
    if (folder / TOKEN_INFO).is_file():
        info = json.loads((folder / TOKEN_INFO).read_text())
        return HostSpec(
            level="token",
            checkpoint=info["base"],
            token_trains=info["token_trains"],
            token_blocks=info["token_blocks"],
            policy_file=str(folder / TOKEN_POLICY),
            **common,
        )
    raise ValueError(f"{folder} is no checkpoint: it has neither {CONFIG} nor {TOKEN_INFO}")


def evaluate(config: RunConfig, hosts: Mapping[str, HostSpec], *, prompts: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Success of every variant on the same held-out prompts.

    Returns:
        ``{"prompts": n, "<variant>": {"sampled", "greedy", "sampled_interval", ...}, "differences": {"improved - cloned": ...}}``;
        intervals are at 95 %: Wilson's for a success rate, paired bootstrap over prompts for a difference.

    Raises:
        ValueError: the engine only simulates decoding.
    """
    if config.rollout.engine == "simulated":
        raise ValueError("rollout.engine is simulated: its rollouts are noise, there is nothing to evaluate; set rollout.engine: local")
    outcomes: dict[str, dict[str, np.ndarray]] = {}
    result: dict[str, Any] = {"prompts": prompts}
    with connected(config):
        dtype = "bfloat16" if config.improve is not None and config.improve.mixed_precision == "bf16" else "float32"
        # Whatever engine trains, one and the same judges.
        rollout = config.rollout.model_copy(update={"engine": "local", "engine_options": {}})
        settings = WorkerSettings(host=None, policy_dtype=dtype, task=config.task, rollout=rollout)
        group = EnvRunnerGroup(config=workers_config(config, settings), local_env_runner=False)
        pool = RolloutPool(group, timeout=config.cluster.worker_timeout_seconds)
        try:
            for name, host in hosts.items():
                outcomes[name], result[name] = _play(pool, config, host, prompts)
                say(f"{name}: sampled {result[name]['sampled']:.3f}, greedy {result[name]['greedy']:.3f}")
        finally:
            group.stop()
    result["differences"] = _differences(outcomes, config.seed)
    return result


def _play(pool: RolloutPool, config: RunConfig, host: HostSpec, prompts: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Both passes of one variant: (success per prompt and pass, numbers for the summary)."""
    parts = chunks(range(prompts), max(config.rollout.num_workers, math.ceil(prompts / PROMPTS_PER_REQUEST)))
    seed = rollout_seed(config.seed, 1) >> 1
    outcomes: dict[str, np.ndarray] = {}
    numbers: dict[str, Any] = {}
    for name, temperature in (("sampled", config.rollout.temperature), ("greedy", 0.0)):
        requests = [
            RolloutRequest(
                request_id=i,
                split="heldout",
                prompt_indices=part,
                seeds=(seed,) * len(part),
                group_size=1,
                host=host,
                temperature=temperature,
                top_k=config.rollout.top_k,
            )
            for i, part in enumerate(parts)
        ]
        pool.submit(requests)
        summaries = [answer.summary for answer in pool.take(range(len(requests)))]
        outcomes[name] = np.array([s for summary in summaries for s in summary.successes], float)
        numbers[name] = float(outcomes[name].mean())
        numbers[f"{name}_interval"] = wilson(int(outcomes[name].sum()), prompts)
        numbers[f"{name}_tokens"] = sum(s.tokens for s in summaries) / prompts
        numbers[f"{name}_failures"] = sum(s.failures for s in summaries)
    return outcomes, numbers


def wilson(successes: int, total: int, z: float = 1.96) -> list[float]:
    """Wilson's 95 % interval of a success rate (Wilson, 1927)."""
    rate, spread = successes / total, z * z / total
    centre = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / total + spread / (4 * total)) / (1 + spread)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def paired_difference(better: np.ndarray, worse: np.ndarray, seed: int, draws: int = 2000) -> dict[str, float]:
    """Mean of ``better - worse`` over the same prompts with its 95 % bootstrap interval."""
    difference = better - worse
    resampled = np.random.default_rng(seed).choice(difference, (draws, len(difference))).mean(1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"mean": float(difference.mean()), "low": float(low), "high": float(high)}


def _differences(outcomes: Mapping[str, Mapping[str, np.ndarray]], seed: int) -> dict[str, Any]:
    """Improved against each of the others, and what came of the replay buffer against what was before it; sampled and greedy."""
    pairs = [("improved", other) for other in outcomes if other != "improved"]
    pairs += [("offline", other) for other in outcomes if other not in ("offline", "improved", "token_level")]
    return {
        f"{better} - {worse}": {p: paired_difference(outcomes[better][p], outcomes[worse][p], seed) for p in ("sampled", "greedy")}
        for better, worse in pairs
        if better in outcomes
    }
