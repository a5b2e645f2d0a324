"""Loads the policy and the Q head of a search, and checks that they fit each other."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from configs.schema import RunConfig
from latent_control.decoding.sampling_params import special_tokens
from latent_control.decoding.stop_strings import holds
from latent_control.pretrained import base_hash
from latent_control.search import ChunkDecoder
from latent_control.search.q_head import QHead, QShape, load_q_head, read_q_shape
from pipeline.storage import checkpoints
from rollout_workers.model_host import Host, load_host
from rollout_workers.rollouts import HostSpec


def checked_q(folder: Path) -> QHead:
    """Load a Q head after checking its files."""
    read_q_shape(folder)
    if problems := checkpoints.verify(folder):
        raise ValueError(
            f"the Q head in {folder} is damaged ({problems[0]}): train it again with latent-control train-q RUN"
        )
    return load_q_head(folder)


def require_fit(shape: QShape, host: Host, folder: Path | None) -> None:
    """``ValueError`` unless the Q head was trained on this base and these codes."""
    assert host.model is not None
    for what, wanted, found in (
        ("codebook and world model", host.world_hash, shape.world_hash),
        ("base LM", base_hash(host.model), shape.base_hash),
    ):
        if wanted != found:
            raise ValueError(
                f"the Q head in {folder} was trained with another {what} (hash {found[:12]}, the checkpoint's is "
                f"{wanted[:12]}): train one on a run with the same actions stage"
            )
    wanted = _reads(host.model.config.policy_state, host.model.config.late_blocks)
    found = _reads(shape.reads, shape.late_blocks)
    if wanted != found:
        raise ValueError(
            f"the Q head in {folder} reads another state of the base ({found}) than the policy "
            f"({wanted}): train one for it"
        )


def _reads(reads: str, late_blocks: int) -> str:
    return f"{reads}, {late_blocks} blocks before the end" if reads != "final" else reads


def load_latent(checkpoint: Path, config: RunConfig) -> Host:
    """The policy with its world model, on the GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = HostSpec(
        level="latent",
        checkpoint=str(checkpoint),
        dtype=config.base.dtype,
        trust_remote_code=config.base.trust_remote_code,
    )
    return load_host(spec, device, torch.float32)


def decoder_of(host: Host, config: RunConfig, head: QHead | None, temperature: float | None) -> ChunkDecoder:
    """A decoder that samples as the run's rollouts did, or at another ``temperature``."""
    return ChunkDecoder(
        host.base,
        host.actor(),
        temperature=config.rollout.temperature if temperature is None else temperature,
        top_k=config.rollout.top_k,
        stop_tokens=special_tokens(host.base.lm, None)[0],
        ends=partial(holds, host.tokenizer, config.rollout.stop) if config.rollout.stop else None,
        q=None if head is None else head.to(host.base.lm.device),
    )
