"""What each model of an evaluation cost to make, from the records of its stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs.gates import VARIANTS
from pipeline.runs.stage_table import IMPROVE, TOKEN_LEVEL, TOKEN_SFT, behind

SUMS = ("tokens", "parameters_trained")


def variant_costs(stages: Mapping[str, Mapping[str, Any]], *, level: str) -> dict[str, dict[str, float]]:
    """Sums over the finished stages behind each variant.

    Args:
        stages: ``{stage: {"seconds": ..., "metrics": {"tokens": ..., "parameters_trained": ...}}}``.
        level: ``improve.level``; at "token", RL starts from the base LM or its SFT and needs none of the other stages.

    Returns: By variant: ``cost_seconds`` (wall), ``cost_tokens`` (generated for RL), ``parameters_trained`` (added up
        over the stages).
    """
    paths = {variant: behind(variant) for variant in VARIANTS}
    if level == "token":
        paths |= dict.fromkeys(("improved", TOKEN_LEVEL), (TOKEN_SFT, IMPROVE))
    return {variant: _sum([stages[name] for name in path if name in stages]) for variant, path in paths.items()}


def _sum(stages: list[Mapping[str, Any]]) -> dict[str, float]:
    totals = {name: float(sum(stage["metrics"].get(name, 0.0) for stage in stages)) for name in SUMS}
    seconds = float(sum(stage["seconds"] for stage in stages))
    return {
        "cost_seconds": seconds,
        "cost_tokens": totals["tokens"],
        "parameters_trained": totals["parameters_trained"],
    }
