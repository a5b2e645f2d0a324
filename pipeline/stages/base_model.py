"""Where the base LM of a config lies."""

from __future__ import annotations

from configs.schema import RunConfig
from latent_control.bases import adapters, smollm2


def resolve_base(config: RunConfig) -> str:
    """A folder or hub id for ``base.model``; the packaged SmolLM2 is converted, a LoRA adapter merged, on first use.

    Raises:
        ValueError: a package that is needed is not installed, or the adapter is not whole; the message says what to do.
    """
    if config.base.model == smollm2.NAME:
        return str(smollm2.smollm2_folder())
    if adapter := adapters.adapter_folder(config.base.model, download=True):
        return str(adapters.merged_folder(adapter, trust_remote_code=config.base.trust_remote_code))
    return config.base.model
