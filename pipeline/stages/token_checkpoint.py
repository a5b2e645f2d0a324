"""Checkpoints without codes: a base LM tuned for the token level, and a token-level policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from latent_control.pretrained import CONFIG, base_path, beside, read_shape, reference
from pipeline.runs.layout import TOKEN_INFO, TOKEN_POLICY
from rollout_workers.rollouts import HostSpec


def write_info(folder: Path, base: str, blocks: int, trains: str | None = None) -> None:
    """Say what the checkpoint in ``folder`` is: ``base``, the folder or hub id of its base LM; what a policy ``trains``
    of it (``None``: it is the base LM alone), and how many blocks."""
    info = {"base": reference(base, folder), "token_blocks": blocks}
    (folder / TOKEN_INFO).write_text(json.dumps(info if trains is None else info | {"token_trains": trains}))


def token_start(folder: Path) -> dict[str, Any]:
    """What RL over tokens starts from: where the base LM lies (``base``) and how many blocks it trains by default
    (``token_blocks``); of a checkpoint with codes its base LM, and as many blocks as its policy has. Of a token-level
    policy ``token_trains``, too."""
    if (folder / CONFIG).is_file():
        return {"base": base_path(folder), "token_blocks": read_shape(folder).policy_layers}
    info: dict[str, Any] = json.loads((folder / TOKEN_INFO).read_text())
    return info | {"base": beside(folder, info["base"])}


def checkpoint_host(folder: Path, common: dict[str, Any]) -> HostSpec:
    """How a worker hosts a checkpoint of any level.

    Raises:
        ValueError: it is none.
    """
    if (folder / CONFIG).is_file():
        return HostSpec(level="latent", checkpoint=str(folder), **common)
    if not (folder / TOKEN_INFO).is_file():
        raise ValueError(f"{folder} is not a checkpoint: it has neither {CONFIG} nor {TOKEN_INFO}")
    info = token_start(folder)
    if "token_trains" not in info:
        return HostSpec(level="base", checkpoint=info["base"], **common)
    return HostSpec(
        level="token",
        checkpoint=info["base"],
        token_trains=info["token_trains"],
        token_blocks=info["token_blocks"],
        policy_file=str(folder / TOKEN_POLICY),
        **common,
    )
