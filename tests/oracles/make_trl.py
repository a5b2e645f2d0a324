"""Writes ``trl.json``: the losses of TRL's own GRPOTrainer on the cases, with their gradients, and its soft overlong
punishment. Run it where TRL is installed, from the repository: ``python tests/oracles/make_trl.py``. The trainer's
method gets log-probabilities in place of a model."""

from __future__ import annotations

import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from cases import CAP, LENGTHS, LIMIT, RECIPES, SEEDS, WINDOW, Case, case
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import get_soft_overlong_punishment

LOSSES = {"dapo": "dapo", "dr_grpo": "dr_grpo", "gspo": "grpo", "cispo": "cispo", "truncated": "bnpo"}
"""TRL's names of the recipes' losses."""


def loss(one: Case, loss_type: str, clips: tuple[float, float], **settings: Any) -> tuple[float, torch.Tensor]:
    """The loss and its gradient by the new log-probabilities [B, T]."""
    mask, old, reference, sampler = (torch.from_numpy(x) for x in (one.mask, one.old, one.reference, one.sampler))
    new = torch.from_numpy(one.new).requires_grad_()
    accelerator = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1)
    defaults = {"importance_sampling_level": "token", "use_vllm": False, "vllm_importance_sampling_correction": True}
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
        aux_loss_enabled=False, _entropy_bonus_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        beta=0.0, args=GRPOConfig(output_dir="unused", bf16=False, use_cpu=True), loss_type=loss_type,
        epsilon_low=clips[0], epsilon_high=clips[1], max_completion_length=mask.shape[1],
        model=SimpleNamespace(training=False), accelerator=accelerator,
        _metrics=defaultdict(lambda: defaultdict(list)), current_gradient_accumulation_steps=1,
        **defaults | settings,
    )  # fmt: skip
    empty = torch.zeros((len(mask), 0), dtype=torch.long)
    found = GRPOTrainer._compute_loss(
        trainer,
        trainer.model,
        {
            "prompt_ids": empty,
            "prompt_mask": empty,
            "completion_ids": torch.zeros_like(mask, dtype=torch.long),
            "completion_mask": mask.long(),
            "advantages": torch.from_numpy(one.rewards - one.rewards.mean()),
            "old_per_token_logps": old,
            "ref_per_token_logps": reference,
            "importance_sampling_ratio": torch.exp(old - sampler).clamp(max=CAP),
            "num_items_in_batch": mask.sum(),
        },
    )
    found.backward()
    assert new.grad is not None
    return float(found.detach()), new.grad


def recipe(one: Case, name: str) -> dict[str, Any]:
    """The loss and gradient of one of ``RECIPES``; TRL's bound of cispo's weight is the bound itself, not what lies
    above 1."""
    asked = RECIPES[name]
    high = asked["clip_high"] + (asked.get("surrogate") == "cispo")
    settings = {"importance_sampling_level": asked.get("ratio", "token"), "use_vllm": name == "truncated"}
    value, gradient = loss(one, LOSSES[name], (asked["clip_low"], high), **settings)
    return {"loss": value, "gradient": [[round(x, 10) for x in row] for row in gradient.tolist()]}


def answers(seed: int) -> dict[str, Any]:
    one = case(seed)
    kinds = {"token": "bnpo", "sequence": "grpo"}
    found: dict[str, Any] = {ours: loss(one, kind, (one.clip_low, one.clip_high))[0] for ours, kind in kinds.items()}
    return found | {"recipes": {name: recipe(one, name) for name in RECIPES}}


if __name__ == "__main__":
    punish = get_soft_overlong_punishment(max_completion_len=LIMIT, soft_punish_cache=WINDOW)
    overlong = punish(completion_ids=[[1] * length for length in LENGTHS])
    record = {"peer": "trl", "version": version("trl"), "overlong": overlong, "answers": list(map(answers, SEEDS))}
    Path(__file__).with_name("trl.json").write_text(json.dumps(record), encoding="utf-8")
