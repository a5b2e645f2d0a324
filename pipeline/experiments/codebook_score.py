"""Settings of latent actions that ``tune-codes`` tries, and the score by which it compares them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from configs.schema import RunConfig

CHOICE_WEIGHT = 0.05
"""What a nat of choice costs, in nats of prediction: a policy over fewer codes is easier to learn. Longer spans get no
bonus for choosing more rarely: reinforcement learning was slower with them (docs/results/number_and_span.md)."""
Settings = dict[str, Any]
"""Fields of the ``actions`` section, e.g. ``{"num_actions": 32, "span": 2}``."""


@dataclass(frozen=True, kw_only=True)
class CodesTrial:
    """One setting and its measures. ``CodesTrial(settings={"num_actions": 32}, measures={"nll_codes": 0.1, ...},
    score=0.3)``."""

    settings: Settings
    measures: Mapping[str, float]
    score: float
    """Nats per token, less is better; see ``score``."""
    updates: int
    """Of the ``actions`` stage, before it was stopped or done."""
    cloned: bool
    reward: dict[str, float] | None = None
    """Of finalists: mean over seeds of the mean reward of a short RL run's last updates, and the 95 % interval over
    seeds, where there is one."""
    seconds: float | None = None
    """Of those runs."""
    error: str | None = None


def score(measures: Mapping[str, float]) -> float:
    """The loss of a codebook in nats per token: less is better.

    ``nll_codes`` (what the codes leave open) + max(0, ``nll_marginal`` - ``nll_base_same``) (what is lost by choosing
    codes without the future; 0 before cloning) + ``CHOICE_WEIGHT`` x ln(code perplexity) (what the policy must choose).
    """
    lost = max(0.0, measures["nll_marginal"] - measures["nll_base_same"]) if "nll_marginal" in measures else 0.0
    return (
        measures["nll_codes"] + lost + CHOICE_WEIGHT * math.log(max(1.0, measures["inverse_dynamics_code_perplexity"]))
    )


def tuned(config: RunConfig, settings: Settings, **improve: Any) -> RunConfig:
    """``config`` with other latent actions. ``final_temperature`` is at most ``temperature``."""
    assert config.actions is not None
    final = min(config.actions.final_temperature, settings["temperature"])
    sections: dict[str, Any] = {
        "actions": config.actions.model_copy(update={**settings, "look_ahead": None, "final_temperature": final})
    }
    if config.improve is not None and improve:
        sections["improve"] = config.improve.model_copy(update=improve)
    return config.model_copy(update=sections)


def depth_of(settings: Settings) -> str:
    """Blocks of inverse dynamics model and policy: ``2``, ``2/4``, or ``default``."""
    layers = {str(settings[name] or "default") for name in ("inverse_dynamics_layers", "policy_layers")}
    return "/".join(sorted(layers))
