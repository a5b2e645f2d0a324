"""Where the base LM of a config lies."""

from __future__ import annotations

from configs.schema import RunConfig
from latent_control import smollm2


def resolve_base(config: RunConfig) -> str:
    """A folder or hub id for ``base.model``; the packaged SmolLM2 is converted on first use.

    Raises:
        ValueError: the package that carries it is not installed; the message says how to.
    """
    if config.base.model == smollm2.NAME:
        return str(smollm2.smollm2_folder())
    return config.base.model
