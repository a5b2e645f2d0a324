"""``latent-control compare``: two runs (or two sides of several seeds) on the same held-out prompts, with their costs.

With one run a side the unit of the interval is the prompt (paired bootstrap, or the exact sign test where few prompts
differ): it says nothing about other seeds. With
several, the unit is the seed (Student's t, paired where both sides have the same seeds, else Welch's), the only honest
one for a claim about a method.
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
from pipeline.evaluation.statistics import paired_difference, student
from pipeline.pages.page import Points, chart, page
from pipeline.runs.layout import CONFIG, METRICS, OUTCOMES, stage_record
from pipeline.runs.metrics_log import records
from pipeline.runs.stage_table import IMPROVE, TOKEN_LEVEL, TOKEN_SFT, level_of
from pipeline.runs.summary import read_summary
from pipeline.tracking.uris import flatten

COSTS = ("seconds", "tokens", "rollouts", "parameters_trained")
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


def config_difference(a: RunConfig, b: RunConfig) -> dict[str, tuple[str | None, str | None]]:
    """Dotted keys that differ, with both values; ``None`` where a side lacks the key."""
    left, right = (flatten(config.model_dump(mode="json")) for config in (a, b))
    return {
        key: (left.get(key), right.get(key))
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
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
    differing = unlike(*sides)
    success = (
        None if missing else {mode: difference(sides[0], sides[1], mode) for mode in MODES if _measured(sides, mode)}
    )
    costs = [{name: _mean([run.costs[name] for run in side]) for name in COSTS} for side in sides]
    ratios = {name: x / y if x and y else None for name in COSTS for x, y in [(costs[0][name], costs[1][name])]}
    result: dict[str, Any] = {
        "a": [str(run.folder) for run in sides[0]],
        "b": [str(run.folder) for run in sides[1]],
        "variants": list(variants),
        "config_difference": config_difference(sides[0][0].config, sides[1][0].config),
        "success": success,
        "costs": {"a": costs[0], "b": costs[1], "a_over_b": ratios},
        "curves": {
            f"{name} {run.folder.name}": run.curve for name, side in zip("AB", sides, strict=True) for run in side
        },
        "notes": notes + differing,
    }
    return result | {"verdict": verdict(result)}


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


def _measured(sides: Sequence[Sequence[Finished]], mode: str) -> bool:
    """Whether each run has this mode: one evaluated by an older version was not decoded by token."""
    return all(run.answers[mode] for side in sides for run in side if run.answers is not None)


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
    if len(a) == 1:
        return about | {"unit": "prompts"} | paired_difference(left[0], right[0], seed=0)
    seeds = [[run.config.seed for run in side] for side in (a, b)]
    same = sorted(seeds[0]) == sorted(seeds[1]) and len(set(seeds[0])) == len(a)
    means = [rates.mean(1)[np.argsort(own)] for rates, own in zip((left, right), seeds, strict=True)]
    found = seed_difference(means[0], means[1], paired=same)
    if found["low"] == found["high"]:  # seeds that happen to agree do not make a difference certain
        found = paired_difference(left.mean(0), right.mean(0), seed=0)
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
    counted, caveat = f"{found['seeds'][0]} and {found['seeds'][1]} seeds", ""
    if found["unit"] == "prompts":
        counted = f"{found['prompts']} prompts"
        caveat = "; one run a side: the interval is over prompts, other seeds may differ"
    mean, low, high = found["mean"], found["low"], found["high"]
    if low > 0:
        cost = f" at {ratio:.2g} of the cost" if ratio else ""
        return f"A is better by {mean:.3f} ({low:.3f} to {high:.3f}){cost}, {counted}{caveat}"
    if high < 0:
        cost = f" at {1 / ratio:.2g} of the cost" if ratio else ""
        return f"B is better by {-mean:.3f} ({-high:.3f} to {-low:.3f}){cost}, {counted}{caveat}"
    cost = f"; A cost {ratio:.2g} of B" if ratio else ""
    return f"no difference can be seen with {counted}: A - B is {mean:+.3f} ({low:+.3f} to {high:+.3f}){cost}{caveat}"


SUCCESS_HEAD = ("success", "A", "B", "A - B", "95 % interval", "unit")
COST_HEAD = ("cost", "A", "B", "A / B")
CONFIG_HEAD = ("config key", "A", "B")


def tables(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Success, cost and config as ``{"title", "head", "rows"}``."""
    success = [
        [
            MODES[mode],
            f"{d['a']:.3f}",
            f"{d['b']:.3f}",
            f"{d['mean']:+.3f}",
            f"{d['low']:+.3f} to {d['high']:+.3f}",
            _unit(d),
        ]
        for mode, d in (result["success"] or {}).items()
    ]
    costs = result["costs"]
    rows = [
        [name.replace("_", " "), *(_number(costs[side][name]) for side in ("a", "b", "a_over_b"))] for name in COSTS
    ]
    keys = [
        [key, *("(absent)" if value is None else value for value in pair)]
        for key, pair in result["config_difference"].items()
    ]
    found = (
        [{"title": "Success on the same held-out prompts", "head": SUCCESS_HEAD, "rows": success}] if success else []
    )
    return [
        *found,
        {"title": "Cost", "head": COST_HEAD, "rows": rows},
        {"title": "Config", "head": CONFIG_HEAD, "rows": keys},
    ]


def _unit(found: Mapping[str, Any]) -> str:
    return (
        f"{found['prompts']} prompts"
        if found["unit"] == "prompts"
        else f"{found['seeds'][0]} + {found['seeds'][1]} seeds"
    )


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def write_page(result: Mapping[str, Any], path: Path) -> Path:
    """The comparison as a page."""
    lines = [
        f"{name}: {', '.join(result[name.lower()])} ({variant})"
        for name, variant in zip("AB", result["variants"], strict=True)
    ]
    charts = [
        chart(f"reward against {x}", x, {k: _points(curve, x) for k, curve in result["curves"].items()})
        for x in ("update", "rollouts", "seconds")
    ]
    title = f"{Path(result['a'][0]).name} against {Path(result['b'][0]).name}"
    text = page(title, lines=[result["verdict"], *lines, *result["notes"]], tables=tables(result), charts=charts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _points(curve: Sequence[Mapping[str, float]], across: str) -> Points:
    return [(point[across], point["reward"]) for point in curve]
