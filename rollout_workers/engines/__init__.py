"""Decoding engines behind one protocol; ``rollout.engine`` names one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from configs.schema import RolloutConfig as RolloutSettings
from rollout_workers.engines.local import LocalEngine
from rollout_workers.engines.protocol import DecodeJob, RolloutEngine
from rollout_workers.engines.simulated import SimulatedEngine
from rollout_workers.engines.vllm import VllmEngine
from rollout_workers.rollouts import HostSpec

__all__ = ["DecodeJob", "RolloutEngine", "load_engine"]

ENGINES: Mapping[str, Callable[..., RolloutEngine]] = {
    "local": LocalEngine.load,
    "simulated": SimulatedEngine.load,
    "vllm": VllmEngine.load,
}


def load_engine(
    spec: HostSpec, settings: RolloutSettings, *, device: torch.device, policy_dtype: torch.dtype
) -> RolloutEngine:
    """The engine ``settings.engine`` names, hosting the model of ``spec``.

    Raises:
        ValueError: there is no such checkpoint, or the engine cannot host it.
    """
    return ENGINES[settings.engine](spec, settings, device=device, policy_dtype=policy_dtype)
