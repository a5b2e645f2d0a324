"""Writes ``verl.json``: verl's own advantages, losses, gradients and KL estimators on the cases. Run it where verl is
installed, from the repository: ``python tests/oracles/make_verl.py``."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from cases import CAP, RECIPES, SEEDS, Case, case, distributions
from verl.trainer.ppo import core_algos as verl
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.workers.config import ActorConfig

LOSSES = {"dapo": "vanilla", "dr_grpo": "vanilla", "gspo": "gspo", "cispo": "cispo", "truncated": "vanilla"}
MEANS = {"token": "token-mean", "sequence": "seq-mean-token-mean", "constant": "seq-mean-token-sum-norm"}
"""verl's names of the recipes' losses and of our means."""


def tensors(one: Case) -> SimpleNamespace:
    found: dict[str, Any] = {
        name: torch.from_numpy(getattr(one, name))
        for name in ("rewards", "baselines", "values", "old", "new", "sampler")
    }
    mask = torch.from_numpy(one.mask)
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    scores = torch.where(last, found["rewards"][:, None], 0.0)
    index = torch.arange(len(mask)).div(one.group, rounding_mode="floor").numpy()
    return SimpleNamespace(**found, mask=mask.double(), scores=scores, index=index)


def rounded(values: torch.Tensor) -> Any:
    """As lists: the file stays small."""
    return json.loads(json.dumps(values.double().tolist()), parse_float=lambda text: round(float(text), 10))


def recipe(t: SimpleNamespace, advantages: torch.Tensor, name: str) -> dict[str, Any]:
    """Loss and gradient by the new log-probabilities [B, T] of one of ``RECIPES``."""
    asked, new = RECIPES[name], t.new.clone().requires_grad_()
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_c=1e9,
        clip_ratio_low=asked["clip_low"], clip_ratio_high=asked["clip_high"],
    )  # fmt: skip
    weights = None
    if name == "truncated":
        weights, _ = compute_rollout_correction_weights(t.old - t.sampler, t.mask, rollout_is_threshold=CAP)
    loss, _ = verl.get_policy_loss_fn(LOSSES[name])(
        t.old, new, advantages, t.mask, MEANS[asked["loss_mean"]], config, weights
    )
    loss.backward()
    return {"loss": float(loss.detach()), "gradient": rounded(new.grad)}


def answers(seed: int) -> dict[str, Any]:
    one = case(seed)
    t = tensors(one)
    config = SimpleNamespace(gamma=one.discount)
    common = {"token_level_rewards": t.scores, "response_mask": t.mask}
    gae, returns = verl.compute_gae_advantage_return(
        t.scores, t.values * t.mask, t.mask, torch.tensor(one.discount), torch.tensor(one.gae_lambda)
    )
    advantages = verl.compute_rloo_outcome_advantage(**common, index=t.index)[0]
    found = {
        "grpo": verl.compute_grpo_outcome_advantage(**common, index=t.index)[0],
        "dr_grpo": verl.compute_grpo_outcome_advantage(**common, index=t.index, norm_adv_by_std_in_grpo=False)[0],
        "rloo": advantages,
        "remax": verl.compute_remax_outcome_advantage(t.scores, t.baselines, t.mask)[0],
        "reinforce_pp": verl.compute_reinforce_plus_plus_outcome_advantage(**common, config=config)[0],
        "ppo": gae,
        "returns": returns,
    }
    found = {name: rounded(value * t.mask) for name, value in found.items()}
    for ours, theirs in (("token", "token-mean"), ("sequence", "seq-mean-token-mean")):
        loss, clipped, _, _ = verl.compute_policy_loss(
            t.old, t.new, advantages, t.mask, cliprange_low=one.clip_low, cliprange_high=one.clip_high,
            clip_ratio_c=1e9, loss_agg_mode=theirs,
        )  # fmt: skip
        found |= {f"loss_{ours}": float(loss), f"effective_clip_{ours}": float(clipped)}
        value_loss, _ = verl.compute_value_loss(t.values, returns, t.values, t.mask, 1e9, loss_agg_mode=theirs)
        found[f"value_loss_{ours}"] = float(value_loss)
    found["recipes"] = {name: recipe(t, advantages, name) for name in RECIPES}
    policy, reference = map(torch.from_numpy, distributions(seed))
    return found | {kind: rounded(verl.kl_penalty_forward(policy, reference, kind)) for kind in ("k1", "k2", "k3")}


if __name__ == "__main__":
    record = {"peer": "verl", "version": version("verl"), "answers": [answers(seed) for seed in SEEDS]}
    Path(__file__).with_name("verl.json").write_text(json.dumps(record), encoding="utf-8")
