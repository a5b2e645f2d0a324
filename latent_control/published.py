"""Checkpoints of the published CoLA code, whose ``config.json`` has ``num_code``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from latent_control.config import LatentActionConfig
from latent_control.tensor_files import read_weights, require_tensors
from latent_control.text import name_ends, saved_ends

PUBLISHED_NAMES = (
    ("model.action_layers.", "inverse_dynamics.decoder.layers."),
    ("model.action_norm.", "inverse_dynamics.decoder.norm."),
    ("model.action_head.", "inverse_dynamics.head."),
    ("model.policy_layers.", "policy.decoder.layers."),
    ("model.policy_norm.", "policy.decoder.norm."),
    ("model.policy_head.", "policy.head."),
    ("model.action_merge_layers.", "merge.blocks."),
)
_COUNTS = ("num_code", "num_action_layer", "num_dyna_layer", "num_policy_layer")


class Published(NamedTuple):
    """``Published(lm, LatentActionConfig(num_actions=64, head="official", ...), {"codebook": tensor, ...})``"""

    lm: PreTrainedModel
    config: LatentActionConfig
    modules: dict[str, torch.Tensor]
    """Tensors beside the base LM, by our names."""


def read_published(folder: Path, dtype: str | torch.dtype) -> Published:
    """A checkpoint of the published CoLA code: one state dict with base, codebook [D, N], stacks and merge layers.

    Raises:
        ValueError: it has no safetensors files, its config lacks a number or describes no base, or a tensor of the base
            is missing, unknown or misshapen.
    """
    raw = json.loads((folder / "config.json").read_text())
    if lacking := [name for name in _COUNTS if name not in raw]:
        raise ValueError(f"{folder / 'config.json'} has num_code, but no {' and no '.join(lacking)}; add what it was")
    tensors = {
        name: tensor
        for file in sorted(folder.glob("model*.safetensors"))
        for name, tensor in read_weights(file).items()
        if not name.endswith("rotary_emb.inv_freq")  # older versions of Llama saved it, today's makes it itself
    }
    if not tensors:
        raise ValueError(
            f"{folder} has no model*.safetensors; convert the published checkpoint to safetensors first (pickles are "
            "not read)"
        )
    codebook = tensors.pop("model.action_code_book.weight", None)
    ours = {} if codebook is None else {"codebook": codebook.T.contiguous()}
    for theirs, mine in PUBLISHED_NAMES:
        ours |= {
            mine + name.removeprefix(theirs): tensors.pop(name) for name in list(tensors) if name.startswith(theirs)
        }
    known = {name: value for name, value in raw.items() if name not in _COUNTS}
    kind = known.pop("model_type", "llama")
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"{folder / 'config.json'}: model_type {kind!r} is none of transformers'; name its base's (llama)"
        )
    base_config = AutoConfig.for_model(kind, **known)
    target = next(iter(tensors.values())).dtype if dtype == "auto" else dtype
    lm = (
        AutoModelForCausalLM.from_config(base_config, dtype=target, trust_remote_code=False)
        .eval()
        .requires_grad_(False)
    )
    wanted = {name: tuple(t.shape) for name, t in lm.state_dict().items()}
    if base_config.tie_word_embeddings and "lm_head.weight" not in tensors:
        wanted.pop("lm_head.weight")
    require_tensors(folder, wanted, {name: tuple(t.shape) for name, t in tensors.items()})
    lm.load_state_dict(tensors, strict=False)
    name_ends(lm.generation_config, saved_ends(folder))
    config = LatentActionConfig(
        num_actions=raw["num_code"],
        head="official",
        inverse_dynamics_layers=raw["num_action_layer"],
        merge_layers=raw["num_dyna_layer"],
        policy_layers=raw["num_policy_layer"],
        inverse_dynamics_reads="final",
        policy_reads="final",
    )
    return Published(lm, config, ours)
