"""Judges an evaluation by the config's gates (form: ``configs.gates``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from configs.gates import VARIANTS, parse_gate
from pipeline.runs.stage_table import MAKERS, TOKEN_LEVEL, TOKEN_SFT

FINAL = (*(name for name in reversed(MAKERS) if name not in (TOKEN_SFT, TOKEN_LEVEL)), TOKEN_LEVEL)
"""Variants, the last model of a run first; the token-level baseline is not what the run is for."""
# Other names of an evaluation's numbers.
ALIASES = {"success": "sampled", "tokens": "sampled_tokens", "failures": "sampled_failures"}
ALIASES |= {name: f"inverse_dynamics_{name}" for name in ("code_perplexity", "alive_codes", "alive_share")}
WORDS = {">=": "at least", "<=": "at most", ">": "above", "<": "below"}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One judged gate. ``Verdict(gate="success >= 0.6", variant="improved", value=0.629, passed=True, tag="success at
    least 0.6")``."""

    gate: str
    variant: str
    value: float | None
    """``None``: not measured, which does not pass."""
    passed: bool
    tag: str
    """The gate in words that MLflow allows in the name of a tag."""


def judge_gates(gates: Sequence[str], result: Mapping[str, Any], final: str) -> list[Verdict]:
    """Every gate's verdict on an evaluation.

    Args:
        result: what ``pipeline.stages.play.evaluate`` returns.
        final: the variant that gates without a variant are about.
    """
    verdicts = []
    for text in gates:
        gate = parse_gate(text)
        variant = gate.variant or final
        value = measure_of(result.get(variant, {}), gate.measure)
        passed = value is not None and gate.holds(value)
        named = f"{gate.variant}.{gate.measure}" if gate.variant else gate.measure
        tag = f"{named} {WORDS[gate.sign]} {gate.bound:g}"
        verdicts.append(Verdict(gate=gate.text, variant=variant, value=value, passed=passed, tag=tag))
    return verdicts


def measure_of(row: Mapping[str, Any], name: str) -> Any:
    """A variant's measure by today's name or an older one, from an evaluation of today or an older one; ``None``: not
    measured."""
    return row.get(ALIASES.get(name, name), row.get(name))


def judgement(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """``{"passed": bool, "verdicts": [{"gate", "variant", "value", "passed", "tag"}]}``, as ``summary.json`` has it."""
    return {
        "passed": all(verdict.passed for verdict in verdicts),
        "verdicts": [asdict(verdict) for verdict in verdicts],
    }


def tags(verdicts: Sequence[Verdict]) -> dict[str, str]:
    """MLflow tags: ``gates`` with all of it, and one for each gate with its value."""
    words = {True: "passed", False: "failed"}
    each = {
        f"gate: {v.tag}": f"{words[v.passed]} ({'not measured' if v.value is None else f'{v.value:.4g}'})"
        for v in verdicts
    }
    return {"gates": words[all(v.passed for v in verdicts)]} | each


def final_of(result: Mapping[str, Any]) -> str:
    """The last model among those an evaluation has; a single checkpoint is compared with the base LM only."""
    there = [name for name, row in result.items() if isinstance(row, dict) and "greedy" in row]
    named = [name for name in FINAL if name in there]
    return named[0] if named else there[-1]


def applicable(gates: Sequence[str], result: Mapping[str, Any]) -> tuple[str, ...]:
    """The gates that a single checkpoint can be judged by: those that name no variant which is not there."""
    return tuple(
        text
        for text in gates
        if (named := parse_gate(text).variant) is None or named not in VARIANTS or named in result
    )
