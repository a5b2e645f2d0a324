"""Writes ``trl.json``: the loss of TRL's own GRPOTrainer on the cases. Run it where TRL is installed, from the
repository: ``python tests/oracles/make_trl.py``. The trainer's method gets log-probabilities in place of a model."""

from __future__ import annotations

import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from cases import SEEDS, case
from trl import GRPOConfig, GRPOTrainer


def loss(seed: int, loss_type: str, beta: float) -> float:
    one = case(seed)
    mask, old, new, reference = (torch.from_numpy(x) for x in (one.mask, one.old, one.new, one.reference))
    accelerator = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
        aux_loss_enabled=False, _entropy_bonus_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", beta=beta, args=GRPOConfig(output_dir="unused", bf16=False, use_cpu=True),
        loss_type=loss_type, epsilon_low=one.clip_low, epsilon_high=one.clip_high, use_vllm=False,
        model=SimpleNamespace(training=False), accelerator=accelerator,
        _metrics=defaultdict(lambda: defaultdict(list)), current_gradient_accumulation_steps=1,
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
        },
    )
    return float(found)


if __name__ == "__main__":
    kinds = {"token": "bnpo", "sequence": "grpo"}
    answers = [{ours: loss(seed, theirs, 0.0) for ours, theirs in kinds.items()} for seed in SEEDS]
    record = {"peer": "trl", "version": version("trl"), "answers": answers}
    Path(__file__).with_name("trl.json").write_text(json.dumps(record), encoding="utf-8")
