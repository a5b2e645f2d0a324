"""Gates: conditions on the evaluation, such as ``success >= 0.6``, that a run must meet. Parsed by a regular
expression, never evaluated.

A gate is ``[variant.]measure OPERATOR number``; without a variant it is about the final one. What each measure is:
docs/evaluation.md.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from configs.schema import RunConfig

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
FORM = re.compile(
    r"\s*(?:([a-z_]+)\.)?([a-z][a-z0-9_]*)\s*(>=|<=|>|<)\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*"
)
EXAMPLE = "e.g. success >= 0.6 or improved.greedy >= 0.5"
VARIANTS = ("base", "cloned", "finetuned", "offline", "improved", "token_sft", "token_level")
PLAYED = ("success", "sampled", "greedy", "tokens", "failures")
"""Measures of any evaluation: success@1 sampled (two names), greedy (of a latent policy: by code); generated tokens per
sampled response; verifier failures."""
BY_TOKEN = "greedy_token"
"""Success@1 of a latent policy, greedy by token."""
DIVERSE = (
    "distinct_1",
    "distinct_2",
    "distinct_3",
    "distinct_responses",
    "differing_pairs",
    "differing_pairs_successful",
)
SEMANTIC = ("semantic_diversity", "semantic_diversity_successful")
ON_TEXT = ("nll", "nll_rise", "base_nll", "base_nll_rise", "kl_to_base")
OF_POLICY = ("policy_code_perplexity", "policy_alive_codes")
"""By the codes that the policy chose in the sampled responses."""
OF_CODES = (
    "nll_codes",
    *(f"inverse_dynamics_{name}" for name in ("code_perplexity", "alive_codes", "alive_share")),
    *("code_perplexity", "alive_codes", "alive_share"),
    "coverage",
    "distinct_tokens",
)
"""Of the codes that the inverse dynamics model gives the text, the names without it being older ones for the same; and
of all codes."""
SLICED = ("slice_gap", "slice_gap_greedy")
SLICED_BY_TOKEN = "slice_gap_greedy_token"
LATENT = (*OF_CODES, *OF_POLICY, BY_TOKEN, SLICED_BY_TOKEN, "base_nll", "base_nll_rise")
"""Measured of latent variants alone."""
COSTS = ("cost_seconds", "cost_tokens", "parameters_trained")
LESS_IS_BETTER = {"tokens", "failures", "nll_codes", *ON_TEXT, *SLICED, SLICED_BY_TOKEN, *COSTS}


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One condition: ``Gate(text="improved.greedy >= 0.5", variant="improved", measure="greedy", sign=">=",
    bound=0.5)``."""

    text: str
    variant: str | None
    """``None`` is the final variant."""
    measure: str
    sign: str
    bound: float

    def holds(self, value: float) -> bool:
        """Whether ``value`` meets it; a NaN never does."""
        return OPERATORS[self.sign](value, self.bound)


def parse_gate(text: str) -> Gate:
    """The gate that ``text`` says.

    Raises:
        ValueError: it has another form.
    """
    match = FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a condition of the form [variant.]measure >= number, {EXAMPLE}")
    variant, measure, sign, bound = match.groups()
    return Gate(text=" ".join(text.split()), variant=variant, measure=measure, sign=sign, bound=float(bound))


def final_variant(config: RunConfig) -> str:
    """What a gate without a variant is about: the last model a run of ``config`` makes."""
    made = made_variants(config)
    last = "token_level" if config.improve is not None and config.improve.level == "token" else "improved"
    return next(name for name in (last, "offline", "finetuned", "cloned", "base") if name in made)


def made_variants(config: RunConfig) -> tuple[str, ...]:
    """The variants that a run of ``config`` evaluates."""
    there = {
        "base": True,
        "cloned": config.clone is not None,
        "finetuned": config.finetune is not None,
        "offline": config.improve_offline is not None,
        "improved": config.improve is not None,
        "token_sft": config.finetune is not None and config.over_tokens,
        "token_level": config.over_tokens,
    }
    return tuple(name for name in VARIANTS if there[name])


def measures(config: RunConfig) -> dict[str, str]:
    """Every measure a gate can name, with what ``config`` lacks for it to be there ("" when nothing)."""
    evaluation = config.evaluation
    assert evaluation is not None
    several = "" if evaluation.samples_per_prompt > 1 else "evaluation.samples_per_prompt of 2 or more"
    text = "" if evaluation.marginal_sequences else "evaluation.marginal_sequences of 1 or more"
    groups = [((*PLAYED, BY_TOKEN), ""), (COSTS, ""), (DIVERSE, several), (ON_TEXT, text), (OF_CODES, text)]
    groups += [(OF_POLICY, "")]
    groups += [(SEMANTIC, several or ("" if evaluation.embedder else "evaluation.embedder"))]
    groups += [((*SLICED, SLICED_BY_TOKEN), "" if evaluation.slices else "evaluation.slices, e.g. [target]")]
    groups += [(tuple(f"pass_at_{k}" for k in evaluation.pass_at), "")]
    return {name: lacks for names, lacks in groups for name in names}


def gate_problems(config: RunConfig) -> Iterator[str]:
    """One message for each gate of ``config`` that could never be judged."""
    if config.gates and config.evaluation is None:
        yield (
            "gates: they judge the evaluation, but evaluation is null; set e.g. evaluation: {prompts: 512}, or "
            "leave gates out"
        )
        return
    for index, text in enumerate(config.gates):
        try:
            gate = parse_gate(text)
        except ValueError as error:
            yield f"gates[{index}]: {error}"
            continue
        yield from (f"gates[{index}]: {problem}" for problem in _unknown(config, gate))


def measure_problems(config: RunConfig, asked: str) -> Iterator[str]:
    """One message for each reason why an evaluation of ``config`` lacks the measure ``asked`` (form:
    ``[variant.]measure``)."""
    try:
        gate = parse_gate(f"{asked} > 0")
    except ValueError:
        yield f"{asked!r} is not a measure of the form [variant.]measure, e.g. success or improved.greedy"
        return
    if config.evaluation is None:
        yield f"{asked}: evaluation is null, so nothing is measured; set e.g. evaluation: {{prompts: 512}}"
        return
    yield from _unknown(config, replace(gate, text=asked))


def _unknown(config: RunConfig, gate: Gate) -> Iterator[str]:
    known, made = measures(config), made_variants(config)
    variant = gate.variant or final_variant(config)
    if variant not in VARIANTS:
        yield f"{gate.text}: unknown variant {variant}; {_near(variant, VARIANTS)}"
    elif variant not in made:
        yield f"{gate.text}: this config makes no variant {variant}; it makes {', '.join(made)}"
    if gate.measure.startswith("pass_at_") and gate.measure not in known:
        assert config.evaluation is not None
        asked, k = list(config.evaluation.pass_at), gate.measure.removeprefix("pass_at_")
        yield f"{gate.text}: {gate.measure} needs {k} in evaluation.pass_at, which is {asked}"
    elif gate.measure not in known:
        yield f"{gate.text}: unknown measure {gate.measure}; {_near(gate.measure, tuple(known))}"
    elif known[gate.measure]:
        yield f"{gate.text}: {gate.measure} needs {known[gate.measure]}"
    elif gate.measure in LATENT and has_no_codes(config, variant):
        yield f"{gate.text}: {variant} has no latent actions, so no {gate.measure}; name another variant"


def has_no_codes(config: RunConfig, variant: str) -> bool:
    """Whether a variant chooses tokens itself, so that there is one greedy decoding of it."""
    at_token_level = variant == "improved" and config.improve is not None and config.improve.level == "token"
    return variant in ("base", "token_sft", "token_level") or at_token_level


def _near(word: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
