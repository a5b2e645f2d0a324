"""The temperature a cloned policy is best improved at, fitted on training prompts and built into the policy.

Cloning matches the base LM's own uncertainty, which is often more than exploration needs. What reinforcement learning
learns from is rollouts of one prompt that differ in reward, so that is what the fit looks for.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from configs.schema import RunConfig
from latent_control.decoding.stop_strings import stop_watch
from latent_control.distributions import rollout_seed
from latent_control.model import LatentActionLM
from latent_control.text import left_padded
from rollout_workers.tasks import Score, build_task
from rollout_workers.tasks.encoding import decode_response, encode_prompt
from rollout_workers.tasks.rewards import Response, judge

PROMPTS, GROUP = 64, 8


def signal(groups: Sequence[Sequence[float]]) -> float:
    """Mean over prompts of the standard deviation of their rollouts' rewards: what a group baseline leaves to learn
    from."""
    return statistics.mean(statistics.pstdev(group) if len(group) > 1 else 0.0 for group in groups)


def rewards_at(model: LatentActionLM, config: RunConfig, tokenizer: Any, temperature: float) -> list[list[float]]:
    """Rewards of ``GROUP`` rollouts of each of ``PROMPTS`` training prompts; those that could not be judged are left
    out."""
    task, limit = build_task(config.task), config.rollout.max_new_tokens
    prompts = [task.prompts("train")[index] for index in range(min(PROMPTS, len(task.prompts("train"))))]
    encoded = [encode_prompt(tokenizer, prompt, chat=config.task.chat) for prompt in prompts]
    seeds = [rollout_seed(config.seed, 3, row) for row in range(len(prompts) * GROUP)]
    settings: dict[str, Any] = {
        "temperature": temperature * config.rollout.temperature,
        "top_k": config.rollout.top_k,
        "row_seeds": seeds,
    }
    settings |= {"batch_size": config.rollout.batch_size, "repeats": GROUP}
    settings["watch"] = stop_watch(tokenizer, config.rollout.stop)
    out = model.generate(*left_padded(encoded, model.codebook.device), max_new_tokens=limit, **settings)
    found: list[list[float]] = [[] for _ in prompts]
    for row in range(len(seeds)):
        length = int(out.lengths[row])
        text = decode_response(tokenizer, out.tokens[row, :length].tolist(), config.rollout.stop)
        stopped = out.finish_reasons[row] == "stop"
        verdict = judge(
            task,
            config.reward,
            prompts[row // GROUP],
            Response(text=text, new_tokens=length, limit=limit, stopped=stopped),
        )
        if isinstance(verdict, Score):
            found[row // GROUP].append(verdict.reward)
    return found


@torch.no_grad()
def sharpen(
    model: LatentActionLM, config: RunConfig, tokenizer: Any, temperatures: Sequence[float]
) -> dict[str, float]:
    """Divide the policy's logits by the one of ``temperatures`` with the most signal; what was measured at each."""
    played = {t: rewards_at(model, config, tokenizer, t) for t in temperatures}
    best = max(temperatures, key=lambda t: signal(played[t]))
    model.policy.head.weight.div_(best)  # a head without bias: its logits are divided exactly
    measured = {f"signal_at_{t:g}": signal(groups) for t, groups in played.items()}
    measured |= {
        f"reward_at_{t:g}": statistics.mean([r for g in groups for r in g] or [0.0]) for t, groups in played.items()
    }
    return measured | {"fitted_temperature": best}
