"""Latent actions for language models: the method of "Controlling Large Language Model with Latent Action" (arXiv
2503.21383)."""

from latent_control.analysis.usage import CodeUsage
from latent_control.auto import LatentActionForCausalLM, LatentControlConfig
from latent_control.auto_generation import LatentGenerateOutput
from latent_control.config import LatentActionConfig
from latent_control.model import LatentActionLM
from latent_control.records import Features, Generation

__all__ = [
    "CodeUsage",
    "Features",
    "Generation",
    "LatentActionConfig",
    "LatentActionForCausalLM",
    "LatentActionLM",
    "LatentControlConfig",
    "LatentGenerateOutput",
]
