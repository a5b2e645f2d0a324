"""Sharding a stage over its workers (FSDP2): base, stacks and optimiser state are split instead of copied to each.

The blocks of each decoder are units of their own, everything else is the root's. Whatever calls into an offline stage's
model outside the stage's own ``forward`` must gather the root first; of ``improve``, each module that is called is a
root.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from latent_control.decoder_stack import DecoderStack, decoder_blocks
from latent_control.model import LatentActionLM

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(stage: nn.Module, model: LatentActionLM, device: torch.device, workers: int) -> None:
    """Split the tensors of ``stage`` and its ``model`` over ``workers`` processes, in place; make the optimiser
    afterwards."""
    mesh = init_device_mesh(device.type, (workers,))
    stacks = [part for part in (model.policy, model.inverse_dynamics) if isinstance(part, DecoderStack)]
    _shard_blocks([model.base.decoder, *(stack.decoder for stack in stacks)], mesh)
    root = fully_shard(stage, mesh=mesh)
    # Otherwise the first block that is called outside the stage's forward would take itself for the root.
    root._get_fsdp_state()._lazy_init()


def shard_root(module: nn.Module, mesh: DeviceMesh, called_by: str, decoder: nn.Module | None = None) -> None:
    """Split the tensors of ``module``, which is called by its method ``called_by`` alone, in place; ``decoder`` is what
    has blocks in it. Whole tensors move to the mesh's device unit by unit, and are there during a call alone."""
    _shard_blocks([] if decoder is None else [decoder], mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(module, called_by)


def _shard_blocks(decoders: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    for decoder in decoders:
        for block in decoder_blocks(decoder)[1]:
            fully_shard(block, mesh=mesh)


@contextmanager
def gathered(stage: nn.Module) -> Iterator[None]:
    """The root's tensors whole for the length of a block; nothing to do for a stage that is not sharded."""
    if isinstance(stage, FSDPModule):
        stage.unshard()
    yield
    if isinstance(stage, FSDPModule):
        stage.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's full value, whether it is split or not."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: torch.Tensor, whole_value: torch.Tensor) -> torch.Tensor:
    """This process's part of ``whole_value``, which all processes have, split as ``tensor`` is."""
    if not isinstance(tensor, DTensor):
        return whole_value
    value = whole_value.to(tensor.device, tensor.dtype)
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)


def whole_arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """Full values as float32 arrays; where tensors are split, on the first process alone, one tensor at a time. All
    processes must call it."""
    found = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if not isinstance(tensor, DTensor) or dist.get_rank() == 0:
            found[name] = value.float().cpu().numpy().copy()
    return found


def whole_model_state(stage: nn.Module) -> dict[str, torch.Tensor]:
    """The stage's state dict, whole, on the main process (empty elsewhere). All processes must call it."""
    return get_model_state_dict(stage, options=WHOLE)


def optimizer_state(stage: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Optimiser state by parameter name, whole, on the main process: any number of workers can go on from it."""
    return get_optimizer_state_dict(stage, optimizer, options=WHOLE)


def restore_optimizer(stage: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Continue from ``optimizer_state``, which every process has read for itself."""
    set_optimizer_state_dict(stage, optimizer, state, options=StateDictOptions(full_state_dict=True))
