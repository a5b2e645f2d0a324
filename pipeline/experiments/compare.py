"""Compares finished runs on the same held-out prompts, with their costs: two sides (``latent-control compare``), or the
methods among 2 to 8 runs (``watch``), where runs of one config but for the seed are one method.

With one seed per side the unit of the interval is the prompt (paired bootstrap, or exact sign test where few prompts
differ): it says nothing about other seeds. With several on both, the unit is the seed (Student's t, paired where both
sides have the same seeds, else Welch's), the only honest one for a claim about a method.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.gates import has_no_codes
from configs.loading import load_config
from configs.schema import RunConfig
from pipeline.evaluation.cost import variant_costs
from pipeline.evaluation.modes import MODES
from pipeline.evaluation.outcome_file import read_outcomes
from pipeline.evaluation.statistics import paired_difference, rate_interval, student
from pipeline.experiments.config_meaning import MEANINGLESS, differing, meaning, method_of
from pipeline.experiments.matched_codes import matched
from pipeline.pages.records import Curve, Figure, as_data
from pipeline.pages.report.curves import band, half_width
from pipeline.runs.layout import CONFIG, METRICS, OUTCOMES, stage_record
from pipeline.runs.metrics_log import records
from pipeline.runs.stage_table import IMPROVE, TOKEN_LEVEL, TOKEN_SFT, level_of
from pipeline.runs.summary import read_summary

COSTS = ("seconds", "tokens", "rollouts", "parameters_trained")
MOST_RUNS, FLIPS, REACH = 8, 30, 10
"""Runs that are compared, flipped prompts that are listed, updates of the mean that has to reach a reward."""
ROUNDING = 1e-9
"""A narrower interval over seeds is none: they happen to agree, which does not make a result certain."""
Answers = dict[str, dict[tuple[str, str], float]]
"""Mode -> (prompt id, prompt) -> mean success over the samples."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A finished run's evaluation, config and costs."""

    folder: Path
    config: RunConfig
    variant: str
    answers: Answers | None
    """``None``: it has no evaluation file."""
    costs: dict[str, float | None]
    curve: list[dict[str, float]]
    """Per update: ``update``, ``rollouts`` and ``seconds`` so far, ``reward``."""


def read_run(folder: Path, variant: str) -> Finished:
    """A finished run; ``ValueError`` when its evaluation has no such variant."""
    config = load_config(folder / CONFIG, [], check_paths=False)
    curve = _curve(folder, config, variant)
    answers = _answers(folder / OUTCOMES, variant) if (folder / OUTCOMES).is_file() else None
    if answers is not None and has_no_codes(config, variant):
        answers["greedy_token"] = answers["greedy"]  # it has one way to be greedy
    return Finished(
        folder=folder,
        config=config,
        variant=variant,
        answers=answers,
        costs=_costs(folder, config, variant, curve),
        curve=curve,
    )


def _answers(path: Path, variant: str) -> Answers:
    rows = read_outcomes(path)
    found: dict[str, dict[tuple[str, str], list[bool]]] = {mode: defaultdict(list) for mode in MODES}
    for row in rows:
        if row.variant == variant:
            # The text too: with other task options the same id is another problem.
            found[row.mode][row.prompt_id, row.prompt].append(row.success)
    if not any(found.values()):
        raise ValueError(
            f"{path} has no variant {variant!r}; it has {', '.join(sorted({r.variant for r in rows}))}: "
            "choose with --variant-a or --variant-b"
        )
    return {mode: {key: float(np.mean(values)) for key, values in some.items()} for mode, some in found.items()}


def _curve(folder: Path, config: RunConfig, variant: str) -> list[dict[str, float]]:
    if variant not in ("improved", TOKEN_LEVEL):
        return []
    stage = TOKEN_LEVEL if variant == TOKEN_LEVEL and level_of(config, IMPROVE) == "latent" else IMPROVE
    curve, sums = [], {"rollouts": 0.0, "tokens": 0.0, "seconds": 0.0}
    for record in records(folder / METRICS):
        if record["stage"] == stage and "reward" in record:
            sums = {
                name: value + record.get("seconds_update_total" if name == "seconds" else name, 0.0)
                for name, value in sums.items()
            }
            curve.append({"update": float(record["step"]), "reward": record["reward"]} | sums)
    return curve


def _costs(
    folder: Path, config: RunConfig, variant: str, curve: Sequence[Mapping[str, float]]
) -> dict[str, float | None]:
    """Wall seconds and trained parameters of the stages behind the variant, rollouts and tokens of its RL; ``None``:
    not known."""
    level = config.improve.level if config.improve is not None else "latent"
    cost = variant_costs(read_summary(folder).get("stages", {}), level=level).get(variant, {})
    last = curve[-1] if curve else {}
    known = {"seconds": cost.get("cost_seconds"), "tokens": last.get("tokens"), "rollouts": last.get("rollouts")}
    return {
        name: value or None for name, value in (known | {"parameters_trained": cost.get("parameters_trained")}).items()
    }


def compare(
    a: Sequence[Path], b: Sequence[Path], variants: tuple[str, str] = ("improved", "improved")
) -> dict[str, Any]:
    """Everything that ``latent-control compare`` prints.

    Raises:
        ValueError: one side has one run and the other several, or the runs share no held-out prompt.
    """
    if min(len(a), len(b)) == 1 < max(len(a), len(b)):
        raise ValueError(f"{len(a)} runs against {len(b)}: an interval over seeds needs 2 or more on each side")
    sides = [
        [read_run(folder, variant) for folder in folders] for folders, variant in zip((a, b), variants, strict=True)
    ]
    missing = [run.folder for side in sides for run in side if run.answers is None]
    notes = [f"{folder} has no {OUTCOMES}; make it with: latent-control evaluate {folder}" for folder in missing]
    success = (
        None
        if missing
        else {mode: difference(sides[0], sides[1], mode) for mode in _modes([run for s in sides for run in s])}
    )
    found = _beside(dict(zip("AB", sides, strict=True)))
    costs = {method["name"].lower(): method["costs"] for method in found["methods"]}
    ratios = {name: x / y if x and y else None for name in COSTS for x, y in [(costs["a"][name], costs["b"][name])]}
    result: dict[str, Any] = {
        "a": [str(run.folder) for run in sides[0]],
        "b": [str(run.folder) for run in sides[1]],
        "variants": list(variants),
        "success": success,
        "costs": costs | {"a_over_b": ratios},
        "curves": {
            f"{name} {run.folder.name}": run.curve for name, side in zip("AB", sides, strict=True) for run in side
        },
        "notes": notes + unlike(*sides),
    }
    return result | found | {"verdict": verdict(result)}


def side_by_side(folders: Sequence[Path], variant: str = "improved") -> dict[str, Any]:
    """The methods among ``folders``, the first run's is A: success, cost and reward, differences from A, flipped
    prompts, matched codes, and where configs differ.

    Raises:
        ValueError: fewer than two runs or more than ``MOST_RUNS``; one has no evaluation of ``variant``.
    """
    if not 2 <= len(folders) <= MOST_RUNS:
        raise ValueError(f"{len(folders)} runs are asked for: choose 2 to {MOST_RUNS}")
    methods: dict[str, list[Finished]] = {}
    for run in (read_run(folder, variant) for folder in folders):
        if run.answers is None:
            raise ValueError(f"{run.folder} has no {OUTCOMES}; make it with: latent-control evaluate {run.folder}")
        methods.setdefault(method_of(run.config), []).append(run)
    return _beside(dict(zip("ABCDEFGH", methods.values(), strict=False)))


def _beside(groups: Mapping[str, Sequence[Finished]]) -> dict[str, Any]:
    """What is shown of methods by name, the first one being what others differ from."""
    runs = [run for group in groups.values() for run in group]
    (name, first), *others = groups.items()
    drawn = all(len(run.curve) > 1 for run in runs)
    level = min(float(np.mean([_final(run) for run in group])) for group in groups.values()) if drawn else None
    judged = all(run.answers is not None for run in runs)
    differences = [
        {"name": f"{other} - {name}", "mode": mode, **_turned(difference(first, group, mode))}
        for other, group in others
        for mode in (_modes([*first, *group]) if judged else ())
    ]
    return {
        "methods": [_method(one, group, level) for one, group in groups.items()],
        "differences": differences,
        "level": level,
        "figures": [as_data(_curves(groups, across)) for across in ("update", "rollouts", "seconds") if drawn],
        "flipped": _flipped(first[0], others[0][1][0]) if others and judged else [],
        "config": differing(
            [meaning(group[0].config) for group in groups.values()],
            MEANINGLESS if len(runs) > len(groups) else (),  # the seed is a difference of single runs
        ),
        "matched": matched({one: group[0].folder for one, group in groups.items()}),
    }


def _turned(found: Mapping[str, Any]) -> dict[str, Any]:
    """A - B as B - A."""
    return {"value": -found["mean"], "low": -found["high"], "high": -found["low"], "unit": unit_of(found)}


def unit_of(found: Mapping[str, Any]) -> str:
    """What an interval is over."""
    seeds = found["seeds"]
    return f"{found['prompts']} prompts" if found["unit"] == "prompts" else f"{seeds[0]} and {seeds[1]} seeds"


def _method(name: str, group: Sequence[Finished], level: float | None) -> dict[str, Any]:
    reached = [_reached(run, level) for run in group] if level is not None else []
    return {
        "name": name,
        "runs": [{"name": run.folder.name, "seed": run.config.seed} for run in group],
        "success": [{"mode": mode, **_rate(group, mode)} for mode in _modes(group)],
        "costs": {cost: _mean([run.costs[cost] for run in group]) for cost in COSTS},
        "reached": {of: _mean([None if one is None else one[of] for one in reached]) for of in ("rollouts", "seconds")},
    }


def _rate(group: Sequence[Finished], mode: str) -> dict[str, Any]:
    rates = [np.array(list(run.answers[mode].values())) for run in group if run.answers is not None]
    means = np.array([[one.mean()] for one in rates])
    if np.ptp(means) < ROUNDING:  # one seed, or all agree
        low, high = rate_interval(rates[0], seed=0)
        return {"value": float(rates[0].mean()), "low": low, "high": high, "unit": f"{len(rates[0])} prompts"}
    mean, (low,), (high,) = _over_seeds(means)
    return {"value": float(mean[0]), "low": float(low), "high": float(high), "unit": f"{len(rates)} seeds"}


def _over_seeds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean [U] of values [seeds, U] with Student's 95 % interval."""
    half = student(len(values) - 1) * values.std(0, ddof=1) / len(values) ** 0.5
    return values.mean(0), values.mean(0) - half, values.mean(0) + half


def _rewards(run: Finished) -> np.ndarray:
    return np.array([point["reward"] for point in run.curve])


def _final(run: Finished) -> float:
    return float(_rewards(run)[-REACH:].mean())


def _reached(run: Finished, level: float) -> Mapping[str, float] | None:
    """The first update whose last ``REACH`` rewards are ``level`` on average; ``None``: never."""
    sums = np.concatenate([[0.0], np.cumsum(_rewards(run))])
    for end in range(min(REACH, len(run.curve)), len(run.curve) + 1):
        if (sums[end] - sums[max(0, end - REACH)]) / min(end, REACH) >= level - 1e-9:
            return run.curve[end - 1]
    return None


def _curves(groups: Mapping[str, Sequence[Finished]], across: str) -> Figure:
    """Reward, smoothed; the band is over seeds where there are several, else over neighbouring updates."""
    curves = []
    for name, group in groups.items():
        length = min(len(run.curve) for run in group)
        rows = [band(_rewards(run)[:length], half_width(length)) for run in group]
        mean, low, high = rows[0] if len(rows) == 1 else _over_seeds(np.array([row[0] for row in rows]))
        x = np.mean([[point[across] for point in run.curve[:length]] for run in group], axis=0)
        label = f"{name}: {', '.join(run.folder.name for run in group)}"
        curves.append(Curve(name=label, x=x.tolist(), y=mean.tolist(), low=low.tolist(), high=high.tolist()))
    note = "Line: mean of neighbouring updates; band: 95 % interval over seeds, with one seed over these updates"
    return Figure(name=f"reward-{across}", title=f"Reward by {across}", across=across, curves=curves, note=note)


def _flipped(a: Finished, b: Finished) -> list[dict[str, Any]]:
    """Held-out prompts that one answers greedily with success and the other does not, with both answers."""
    sides = [
        {
            (row.prompt_id, row.prompt): row
            for row in read_outcomes(run.folder / OUTCOMES)
            if row.variant == run.variant and row.mode == "greedy"
        }
        for run in (a, b)
    ]
    pairs = [(key[1], one, sides[1][key]) for key, one in sides[0].items() if key in sides[1]]
    return [
        {"prompt": prompt, "a": one.response, "b": other.response, "better": "b" if other.success else "a"}
        for prompt, one, other in pairs
        if one.success != other.success
    ][:FLIPS]


def unlike(a: Sequence[Finished], b: Sequence[Finished]) -> list[str]:
    """What the sides differ in that makes a comparison of their success one of two things at once."""
    found = []
    at = [", ".join(f"{t:g}" for t in sorted({run.config.rollout.temperature for run in side})) for side in (a, b)]
    if at[0] != at[1]:
        text = f"A was sampled at rollout.temperature {at[0]}, B at {at[1]}: sampled success is of both; go by"
        found.append(f"{text} greedy by token, or train and evaluate both at one")
    for run in (*a, *b):
        tuned = run.variant == TOKEN_LEVEL and run.config.finetune is not None
        if tuned and not (run.folder / stage_record(TOKEN_SFT)).is_file():
            text = f"the token level of {run.folder} started from the base LM as finetune changed it under codes (an"
            found.append(f"{text} earlier version); run its config again")
    return found


def _modes(runs: Sequence[Finished]) -> list[str]:
    """Those that each run has: one evaluated by an older version was not decoded by token."""
    return [mode for mode in MODES if all(run.answers and run.answers.get(mode) for run in runs)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def difference(a: Sequence[Finished], b: Sequence[Finished], mode: str) -> dict[str, Any]:
    """Success of both sides on the prompts that all runs evaluated, and A - B with its 95 % interval."""
    played = [run.answers[mode] for run in (*a, *b) if run.answers is not None]
    common = sorted(set.intersection(*(set(answers) for answers in played)))
    if not common:
        raise ValueError(
            "the runs have no held-out prompt in common: compare runs of one task with the same task.options"
        )
    values = np.array([[answers[key] for key in common] for answers in played])  # [runs, P]
    left, right = values[: len(a)], values[len(a) :]
    about = {"a": float(left.mean()), "b": float(right.mean()), "prompts": len(common), "seeds": [len(a), len(b)]}
    if min(len(a), len(b)) == 1:
        return about | {"unit": "prompts"} | paired_difference(left.mean(0), right.mean(0), seed=0)
    seeds = [[run.config.seed for run in side] for side in (a, b)]
    same = sorted(seeds[0]) == sorted(seeds[1]) and len(set(seeds[0])) == len(a)
    means = [rates.mean(1)[np.argsort(own)] for rates, own in zip((left, right), seeds, strict=True)]
    found = seed_difference(means[0], means[1], paired=same)
    if found["high"] - found["low"] < ROUNDING:
        return about | {"unit": "prompts"} | paired_difference(left.mean(0), right.mean(0), seed=0)
    return about | {"unit": "seeds"} | found


def seed_difference(a: np.ndarray, b: np.ndarray, *, paired: bool) -> dict[str, float]:
    """Mean of A - B over seeds with Student's 95 % interval: paired by seed, or Welch's."""
    if paired:
        spread, freedom = float(np.var(a - b, ddof=1)) / len(a), len(a) - 1.0
    else:
        parts = [float(np.var(x, ddof=1)) / len(x) for x in (a, b)]
        spread = sum(parts)
        below = sum(part**2 / (len(x) - 1) for part, x in zip(parts, (a, b), strict=True))
        freedom = spread**2 / below if below else len(a) + len(b) - 2.0
    mean, half = float(a.mean() - b.mean()), student(freedom) * spread**0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


def verdict(result: Mapping[str, Any]) -> str:
    """One sentence supported by the interval of sampled success."""
    if result["success"] is None:
        return "no verdict: " + "; ".join(result["notes"])
    found = result["success"]["sampled"]
    ratio = result["costs"]["a_over_b"]["seconds"]
    counted, one = unit_of(found), "; one seed per side: the interval is over prompts, other seeds may differ"
    caveat = one if min(found["seeds"]) == 1 else ""
    mean, low, high = found["mean"], found["low"], found["high"]
    if low > 0:
        cost = f" at {ratio:.2g} of the cost" if ratio else ""
        return f"A is better by {mean:.3f} ({low:.3f} to {high:.3f}){cost}, {counted}{caveat}"
    if high < 0:
        cost = f" at {1 / ratio:.2g} of the cost" if ratio else ""
        return f"B is better by {-mean:.3f} ({-high:.3f} to {-low:.3f}){cost}, {counted}{caveat}"
    cost = f"; A cost {ratio:.2g} times B" if ratio else ""
    return f"no significant difference with {counted}: A - B is {mean:+.3f} ({low:+.3f} to {high:+.3f}){cost}{caveat}"
