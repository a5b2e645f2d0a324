"""``latent-control pilot``: is RL over latent actions worth it on a user's own rows? A small A/B test within a time
limit.

Both sides run in one run folder with one trainer: ``improve`` over codes and, by ``improve.token_baseline``, over
tokens, with the same updates, prompts, group size and rewards. First the base LM answers the training prompts, and
codes are found on that (a few hundred answers would be learned by heart); a probe of a few updates measures what each
costs here; then the number of updates is chosen that fits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from configs.loading import load_config
from configs.schema import Actions, Clone, DataSource, Evaluation, Improve, RunConfig
from configs.yaml_text import write
from pipeline.experiments.compare import compare
from pipeline.experiments.comparison_page import write_page
from pipeline.experiments.sample_base import sample
from pipeline.preflight.init_config import samples_source
from pipeline.run import run
from pipeline.runs.layout import METRICS
from pipeline.runs.metrics_log import records
from pipeline.runs.stage_table import ACTIONS, CLONE, FINETUNE, IMPROVE, IMPROVE_OFFLINE, TOKEN_LEVEL
from pipeline.storage.atomic import write_atomic
from rollout_workers.tasks import build_task

CONFIG, PROBE, RESULT, PAGE, SAMPLES = "pilot.yaml", "probe", "result", "comparison.html", "samples.jsonl"
FULL = {ACTIONS: 600, CLONE: 500, TOKEN_LEVEL: 150, IMPROVE: 150}
"""Updates of a pilot that has all the time it wants: those of configs/countdown.yaml."""
FEWEST = {ACTIONS: 60, CLONE: 50, TOKEN_LEVEL: 15, IMPROVE: 15}
"""With fewer nothing is learned that an evaluation could see."""
PROBED = {ACTIONS: 8, CLONE: 8, TOKEN_LEVEL: 4, IMPROVE: 4}
RESPONSES = 2048
"""Of the base LM, over all training prompts: what codes are found on."""
RESERVE = 0.1
"""Share of the time that is kept back: the machine may be slower later on."""
VISIBLE = 0.05
"""A difference of success that would matter."""


@dataclass(frozen=True, kw_only=True)
class PilotData:
    """The user's data and how to judge answers. ``PilotData(path=Path("data.jsonl"), verifier="number")``."""

    path: Path
    prompt: str = "prompt"
    answer: str = "answer"
    verifier: str = "exact"
    """A name, or a function of one's own: ``rewards.py`` or ``rewards.py:judge``."""

    def options(self) -> dict[str, Any]:
        """``task.options`` of the rows."""
        file, _, function = self.verifier.partition(":")
        judging: dict[str, Any] = {"verifier": self.verifier}
        if file.endswith(".py"):
            own = {"path": str(Path(file).absolute()), "function": function or "reward"}
            judging = {"verifier": "python", "python": own}
        return {"path": str(self.path), "prompt": self.prompt, "answer": self.answer, **judging}


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Measurements of the probe, in seconds. ``Pace(update={"improve": 0.3, ...}, fixed=20.0, probe=35.0)``."""

    update: Mapping[str, float]
    """Of one update of each stage."""
    fixed: float
    """Loading, saving and the evaluation, however many updates there are."""
    probe: float
    """Of sampling and the probe itself."""


def template(rows: PilotData, base: str, *, chat: bool, max_new_tokens: int, heldout: int) -> dict[str, Any]:
    """The config of a pilot without numbers of updates."""
    offline = {"batch_size": 16, "learning_rate": 1e-3}
    improve = {
        "algorithm": "grpo",
        "token_baseline": True,
        "prompts_per_update": 8,
        "group_size": 8,
        "learning_rate": 5e-4,
    }
    return {
        "seed": 0,
        "base": {"model": base},
        "task": {"name": "rows", "options": rows.options(), "chat": chat},
        "actions": {"num_actions": 64, **offline, "min_alive_share": 0.0},
        "clone": offline,
        "improve": improve | {"token_learning_rate": 1e-4},
        "rollout": {"num_workers": 2, "max_new_tokens": max_new_tokens},
        "evaluation": {"prompts": heldout, "marginal_sequences": 0},
    }


def template_of(config: RunConfig) -> dict[str, Any]:
    """A user's own config as a pilot: its base LM, task, reward, rollouts and settings of the stages, both sides; no
    other stage, and codes of its own.

    Raises:
        ValueError: it reuses codes, trains its base LM, or says that there is only one side.
    """
    named = {"base.train": config.base.train, "actions.init": config.actions and config.actions.init}
    if given := [name for name, value in named.items() if value is not None]:
        raise ValueError(f"{given[0]}: a pilot finds its own codes on a base LM as it is; leave {given[0]} out")
    if config.improve is not None and config.improve.level == "token":
        raise ValueError("improve.level: a pilot has both sides, this says token; leave improve.level out")
    found = config.model_dump(mode="json") | {FINETUNE: None, IMPROVE_OFFLINE: None, "gates": []}
    for name, section in ((ACTIONS, Actions()), (CLONE, Clone()), (IMPROVE, Improve()), ("evaluation", Evaluation())):
        found[name] = found[name] or section.model_dump(mode="json")
    for name in (ACTIONS, CLONE):
        found[name]["data"] = [DataSource().model_dump(mode="json")]  # until the base LM has answered
    found[IMPROVE]["token_baseline"] = True
    found[ACTIONS]["min_alive_share"] = 0.0  # few updates may leave many codes unused; that is for a run to mind
    return found


def with_updates(config: Mapping[str, Any], updates: Mapping[str, int]) -> dict[str, Any]:
    """``config`` with its numbers of updates; both sides of ``improve`` take as many."""
    found = {**config} | {name: {**config[name], "updates": updates[name]} for name in (ACTIONS, CLONE, IMPROVE)}
    found[IMPROVE]["warmup_updates"] = min(found[IMPROVE].get("warmup_updates", 0), updates[IMPROVE])
    return found


def measure(run_dir: Path, seconds: float) -> Pace:
    """The pace of a run that took ``seconds``: the median step of each stage, and what is left over."""
    times: dict[str, list[float]] = {}
    for record in records(run_dir / METRICS):
        times.setdefault(record["stage"], []).append(record["time"])
    update = {name: median(b - a for a, b in zip(times[name], times[name][1:], strict=False)) for name in FULL}
    spent = sum(update[name] * len(times[name]) for name in FULL)
    return Pace(update=update, fixed=max(0.0, seconds - spent), probe=seconds)


def planned_updates(pace: Pace, minutes: float) -> dict[str, int]:
    """As large a share of ``FULL`` as the time allows, at most all of it.

    Raises:
        ValueError: less than ``FEWEST`` fits; says how many minutes would do.
    """
    available = 60 * minutes * (1 - RESERVE) - pace.probe - pace.fixed
    full = sum(pace.update[name] * count for name, count in FULL.items())
    share = min(1.0, available / full) if full else 1.0
    if share < (least := max(FEWEST[name] / FULL[name] for name in FULL)):
        needed = (pace.probe + pace.fixed + least * full) / (60 * (1 - RESERVE))
        each = ", ".join(f"{name} {pace.update[name]:.2f} s" for name in FULL)
        raise ValueError(
            f"--minutes {minutes:g}: nothing useful fits; measured here: {each} an update, {pace.fixed:.0f} s for "
            f"loading and evaluation, {pace.probe:.0f} s of measuring; give --minutes {needed:.1f} or more, a smaller "
            "--base or a smaller --max-new-tokens"
        )
    return {name: int(share * count) for name, count in FULL.items()}


def pilot(folder: Path, config: Mapping[str, Any], minutes: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Sample, probe, plan, run both sides, compare. Leaves ``pilot.yaml`` (ready to run), ``result`` (a run folder) and
    a page.

    Raises:
        ValueError: nothing useful fits into ``minutes``.
    """
    started = time.perf_counter()
    config = sampled(folder, config, say)
    say(f"pilot: measuring a few updates of each side (budget {minutes:g} minutes)")
    measured = time.perf_counter()
    probe = run(load_config(written(folder / f"{PROBE}.yaml", with_updates(config, PROBED))), folder / PROBE)
    now = time.perf_counter()
    pace = replace(measure(probe, now - measured), probe=now - started)
    updates = planned_updates(pace, minutes)
    about = ", ".join(f"{name} {count} x {pace.update[name]:.2f} s" for name, count in updates.items())
    expected = pace.fixed + sum(pace.update[name] * count for name, count in updates.items())
    say(f"pilot: {about}; about {(expected + pace.probe) / 60:.1f} of {minutes:g} minutes in all")
    done = run(load_config(written(folder / CONFIG, with_updates(config, updates))), folder / RESULT)
    seconds = time.perf_counter() - started
    result = compare([done], [done], ("improved", TOKEN_LEVEL))
    page = folder / PAGE
    write_page(result, page)
    found = result | {
        "updates": updates,
        "seconds": seconds,
        "page": str(page),
        "config": str(folder / CONFIG),
        "advice": advice(result),
    }
    write_atomic(folder / "pilot.json", json.dumps(found, indent=1).encode())
    return found


def sampled(folder: Path, config: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """``config`` with codes found on the base LM's own responses, which are written to ``samples.jsonl``."""
    settings = load_config(folder / CONFIG)
    prompts = len(build_task(settings.task).prompts("train"))
    count = max(1, RESPONSES // prompts)
    say(f"pilot: the base LM answers {prompts} training prompts, {count} times each")
    found = sample(settings, folder / SAMPLES, count, lambda text: None)
    for line in found.words():
        say(f"pilot: {line}")
    hopeless = "" if found.success else "; where it never succeeds, neither side can learn"
    say(f"pilot: its success is {found.success_text}{hopeless}")
    if found.failed == found.responses:
        raise ValueError("the verifier judged no response of the base LM, so nothing can be compared: mend it first")
    data = [samples_source(SAMPLES, chat=settings.task.chat)]
    return {**config} | {name: {**config[name], "data": data} for name in (ACTIONS, CLONE)}


def written(path: Path, config: Mapping[str, Any]) -> Path:
    """``config`` as a YAML file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"# Written by latent-control pilot; run it with: latent-control run {path.name}\n{write(dict(config))}",
        encoding="utf-8",
    )
    return path


def advice(result: Mapping[str, Any]) -> list[str]:
    """What to spend next, given the difference of sampled success (A: latent, B: token level)."""
    found = result["success"]["sampled"]
    if max(found["a"], found["b"]) < 0.02:
        return [
            "neither side solves rows: no reward, nothing to learn from; try an easier verifier, a larger --base, "
            "or finetune first"
        ]
    if found["low"] > 0 or found["high"] < 0:
        better = "latent actions are" if found["low"] > 0 else "the token level is"
        return [
            f"on these rows {better} ahead with one seed; next, spend on seeds: run pilot.yaml with seed=1 and seed=2, "
            "then compare with --a, --b, so that the interval covers training too",
            "the token level was given one learning rate: sweep improve.token_learning_rate before believing a win "
            "over it",
        ]
    half = (found["high"] - found["low"]) / 2
    prompts = round(found["prompts"] * (half / VISIBLE) ** 2)
    lines = [f"the interval is {half:.3f} to either side with {found['prompts']} held-out prompts"]
    if half > VISIBLE:
        lines.append(
            f"to see a difference of {VISIBLE} takes about {prompts} held-out prompts: add rows before adding minutes"
        )
    else:
        lines.append(
            f"a difference of {VISIBLE} or more would have been seen: only more updates (--minutes) or a larger "
            "--base can change that"
        )
    return lines
