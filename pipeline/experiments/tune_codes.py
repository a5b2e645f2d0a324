"""``latent-control tune-codes``: searches the codebook that suits a base LM and task, with little compute on most
settings and much on a few.

Stage one, cheap: Ray Tune with ASHA (Li et al., 2020) trains the ``actions`` stage of many settings, stops the worse
ones early and clones the policy of the survivors. Stage two, expensive: the best of them are cloned in full and
improved by a short reinforcement learning run, which decides.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from configs.loading import dump_config
from configs.schema import RunConfig
from pipeline.cluster.connect import connected
from pipeline.console.displays import Display
from pipeline.evaluation.statistics import student
from pipeline.experiments.codebook_score import CodesTrial, Settings, depth_of, score, tuned
from pipeline.run import run
from pipeline.runs.context import StageContext
from pipeline.runs.layout import METRICS
from pipeline.runs.metrics_log import RunLog, series
from pipeline.runs.stage_table import ACTIONS, CLONE, IMPROVE
from pipeline.storage.atomic import write_atomic

CLONE_SHARE = 0.3
"""Share of the ``clone`` stage's updates that the cheap stage spends."""
FIRST_LOOK = 0.25
"""Share of the ``actions`` stage's updates before which no trial is stopped."""
SEARCH_SHARE = 0.45
"""Share of the time for the cheap stage."""
LAST = 20
"""Updates over whose mean reward finalists are compared."""
SEEDS = 2
"""Of each finalist: one run does not show how far runs of one setting differ."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """Values to try of each field; an empty one keeps the config's."""

    num_actions: Sequence[int] = (16, 32, 64, 128)
    span: Sequence[int] = (1, 2, 4)
    temperature: Sequence[float] = (1.0, 2.0)
    layers: Sequence[int] = ()
    """Of inverse dynamics model and policy together."""

    def settings(self, config: RunConfig, count: int, seed: int) -> list[Settings]:
        """``count`` settings: the config's own first, then others drawn without replacement."""
        assert config.actions is not None
        own = {
            name: getattr(config.actions, name)
            for name in ("num_actions", "span", "temperature", "inverse_dynamics_layers", "policy_layers")
        }
        layers = [{"inverse_dynamics_layers": n, "policy_layers": n} for n in self.layers] or [{}]
        others = [
            own | {"num_actions": n, "span": k, "temperature": tau} | more
            for n, k, tau, more in itertools.product(
                self.num_actions or [own["num_actions"]],
                self.span or [own["span"]],
                self.temperature or [own["temperature"]],
                layers,
            )
        ]
        others = [setting for setting in others if setting != own]
        return [own, *random.Random(seed).sample(others, min(count - 1, len(others)))]


class _Reporter(RunLog):
    """Passes every held-out measurement on."""

    def __init__(self, run_dir: Path, report: Callable[[str, int, dict[str, float]], None]) -> None:
        super().__init__(run_dir, quiet=True)
        self._report = report

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics and report them to the search."""
        super().log(stage, step, metrics)
        if "nll_codes" in metrics:
            self._report(stage, step, dict(metrics))


def cheap_trial(config: RunConfig, base: str, folder: Path, report: Callable[[dict[str, float]], None]) -> None:
    """Learn a codebook, clone the policy for some updates; ``report`` gets measures and score with each evaluation."""
    from pipeline.stages.offline import run_offline
    from rollout_workers.tasks import build_task

    assert config.actions is not None and config.clone is not None
    actions, measured = config.actions, dict[str, float]()

    def on_measures(stage: str, step: int, metrics: dict[str, float]) -> None:
        measured.update(metrics)
        done = step if stage == ACTIONS else actions.updates + step
        report({**measured, "updates": float(done), "score": score(measured), "cloned": float(stage == CLONE)})

    context = StageContext(
        config=config, run_dir=folder, log=_Reporter(folder, on_measures), task=build_task(config.task)
    )
    found = run_offline(context, ACTIONS, actions, None, base)
    updates = max(1, int(CLONE_SHARE * config.clone.updates))
    short = config.clone.model_copy(update={"updates": updates, "evaluate_every": updates})
    run_offline(context, CLONE, short, found.checkpoint, base)


def search(
    config: RunConfig, settings: Sequence[Settings], seconds: float, say: Callable[[str], None]
) -> list[CodesTrial]:
    """The cheap stage: all settings start, the worse ones are stopped early; best first."""
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    from pipeline.stages.base_model import resolve_base

    assert config.actions is not None
    look = max(1, int(FIRST_LOOK * config.actions.updates))
    quick = config.model_copy(update={"cluster": config.cluster.model_copy(update={"learner_threads": 1})})
    base = resolve_base(config)

    def trainable(chosen: dict[str, Settings]) -> None:
        trial = tuned(quick, chosen["settings"])
        assert trial.actions is not None
        trial = trial.model_copy(
            update={"actions": trial.actions.model_copy(update={"evaluate_every": look, "min_alive_share": 0.0})}
        )
        with tempfile.TemporaryDirectory() as folder:
            cheap_trial(trial, base, Path(folder), tune.report)

    scheduler = ASHAScheduler(
        time_attr="updates",
        metric="score",
        mode="min",
        grace_period=look,
        reduction_factor=3,
        max_t=10 * config.actions.updates,
    )
    # Tune pickles its state: it does not outlive the search
    with connected(config), tempfile.TemporaryDirectory() as storage:
        at_once = min(len(settings), int(ray.cluster_resources()["CPU"]))
        say(f"search: {len(settings)} settings, {at_once} at a time, at most {seconds / 60:.0f} minutes")
        results = tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            param_space={"settings": tune.grid_search(list(settings))},
            tune_config=tune.TuneConfig(scheduler=scheduler, time_budget_s=seconds),
            run_config=tune.RunConfig(storage_path=storage, name="codes", verbose=0, callbacks=[_progress(say)]),
        ).fit()
        found = [_trial(result.config["settings"], result.metrics or {}, result.error) for result in results]
    return sorted(found, key=lambda trial: (not trial.cloned, trial.score))


def _progress(say: Callable[[str], None]) -> Any:
    from ray.tune import Callback

    class Progress(Callback):  # type: ignore[misc]
        """One line for each trial that ends."""

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            last, done = trial.last_result, 1 + sum(t.is_finished() for t in trials)
            value = f"score {last['score']:.3f} after {last['updates']:.0f} updates" if "score" in last else "no result"
            say(f"search {done}/{len(trials)}  {named(trial.config['settings'])}  {value}")

    return Progress()


def named(settings: Settings) -> str:
    """A short name: ``64 codes, span 1, temperature 2, 2 layers``."""
    return (
        f"{settings['num_actions']} codes, span {settings['span']}, temperature {settings['temperature']:g}, "
        f"{depth_of(settings)} layers"
    )


def _trial(settings: Settings, metrics: Mapping[str, Any], error: Exception | None) -> CodesTrial:
    measured = (
        "nll_codes",
        "nll_base",
        "nll_marginal",
        "nll_base_same",
        "inverse_dynamics_code_perplexity",
        "inverse_dynamics_alive_share",
        "coverage",
        "distinct_tokens",
    )
    return CodesTrial(
        settings=settings,
        measures={name: float(metrics[name]) for name in measured if name in metrics},
        score=float(metrics.get("score", math.inf)),
        updates=int(metrics.get("updates", 0)),
        cloned=bool(metrics.get("cloned", 0.0)),
        error=None if error is None else str(error).strip().splitlines()[-1],
    )


def finalists(trials: Sequence[CodesTrial], count: int, own: Settings) -> list[CodesTrial]:
    """The ``count`` best cloned settings, the config's own always among them: what is recommended is at least as
    good."""
    cloned = [trial for trial in trials if trial.cloned]
    best = cloned[:count]
    given = next((trial for trial in trials if trial.settings == own), None)
    if given is None or given in best:
        return best
    return [*best[: max(0, count - 1)], given]


def decide(
    config: RunConfig,
    chosen: Sequence[CodesTrial],
    folder: Path,
    *,
    updates: int,
    deadline: float,
    say: Callable[[str], None],
) -> list[CodesTrial]:
    """Clone each finalist in full and improve it for ``updates``, with one seed after another; what time is not left
    for is left out."""
    rewards: list[list[float]] = [[] for _ in chosen]
    seconds, longest = [0.0] * len(chosen), 0.0
    for seed, (number, trial) in itertools.product(range(config.seed, config.seed + SEEDS), enumerate(chosen)):
        about = f"finalist {number + 1}/{len(chosen)}  seed {seed}  {named(trial.settings)}"
        if time.monotonic() + longest > deadline and rewards[0]:
            say(f"{about}  left out: no time")
            continue
        started = time.monotonic()
        say(f"{about}  reinforcement learning, {updates} updates")
        short = tuned(config, trial.settings, updates=updates).model_copy(
            update={"evaluation": None, "finetune": None, "seed": seed}
        )
        done = run(short, folder / f"finalist-{number + 1}-seed-{seed}", Display())
        rewards[number].append(fmean(series(done / METRICS, IMPROVE, "reward")[-LAST:]))
        seconds[number] += (took := time.monotonic() - started)
        longest = max(longest, took)
        say(f"{about}  reward {rewards[number][-1]:.3f}")
    found = reward_intervals(rewards)
    return [
        replace(trial, reward=reward, seconds=spent or None)
        for trial, reward, spent in zip(chosen, found, seconds, strict=True)
    ]


def reward_intervals(rewards: Sequence[Sequence[float]]) -> list[dict[str, float] | None]:
    """Of each finalist, given its rewards by seed: the mean, with Student's 95 % interval where any has two seeds (one
    spread for all finalists, pooled: few seeds alone say little about theirs); ``None`` without a reward."""
    freedom = sum(len(own) - 1 for own in rewards if own)
    squares = sum((reward - fmean(own)) ** 2 for own in rewards for reward in own)
    found: list[dict[str, float] | None] = []
    for own in rewards:
        reward = {"mean": fmean(own), "seeds": float(len(own))} if own else None
        if reward is not None and freedom:
            half = student(freedom) * math.sqrt(squares / freedom / len(own))
            reward |= {"low": reward["mean"] - half, "high": reward["mean"] + half}
        found.append(reward)
    return found


def told_apart(better: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether the 95 % interval of the difference of two means, by their own intervals, lies above 0."""
    if "low" not in better or "low" not in other:
        return False
    return better["mean"] - other["mean"] > math.hypot(better["mean"] - better["low"], other["high"] - other["mean"])


def equals(played: Sequence[CodesTrial]) -> list[CodesTrial]:
    """The finalist with the most reward and those that are not told apart from it, those that were not run among them,
    the fewest codes first; where none was run, the one with the best score."""
    judged = [trial.reward for trial in played if trial.reward is not None]
    if not judged:
        return [min(played, key=lambda trial: trial.score)]
    best = max(judged, key=lambda reward: reward["mean"])
    same = [trial for trial in played if trial.reward is None or not told_apart(best, trial.reward)]
    return sorted(same, key=lambda trial: (trial.settings["num_actions"], trial.settings["span"]))


def recommended(played: Sequence[CodesTrial], own: Settings) -> CodesTrial:
    """The config's own settings unless another finalist is better beyond the spread over seeds; else the fewest codes
    among the best."""
    same = equals(played)
    run = [trial for trial in same if trial.reward is not None] or same
    return next((trial for trial in same if trial.settings == own), run[0])


def verdict(played: Sequence[CodesTrial], own: Settings) -> str:
    """Why ``recommended`` is, in a sentence."""
    best, same = recommended(played, own), equals(played)
    if not any(trial.reward for trial in played):
        return "no finalist was run in the time there was (--minutes): the one with the best score is taken"
    if len(same) == 1:
        return f"{named(best.settings)} has more reward than each other finalist"
    seeds = sorted({int(trial.reward.get("seeds", 0)) if trial.reward else 0 for trial in same})
    rule = "the config's own setting is kept" if best.settings == own else "the one with the fewest codes is taken"
    each = "1 seed each" if seeds == [1] else f"{' or '.join(map(str, seeds))} seeds each"
    return (
        f"{len(same)} of {len(played)} finalists are not told apart by {each} "
        f"({'; '.join(named(trial.settings) for trial in same)}): {rule}"
    )


def require_stages(config: RunConfig) -> None:
    """Raise ``ValueError`` unless the config has the sections actions, clone and improve."""
    missing = [name for name in (ACTIONS, CLONE, IMPROVE) if getattr(config, name) is None]
    if missing:
        raise ValueError(f"tune-codes needs the sections actions, clone and improve; missing: {', '.join(missing)}")
    assert config.actions is not None
    if config.actions.init is not None:
        raise ValueError(f"actions.init: {config.actions.init} is a codebook already; leave it out to search for one")


def tune_codes(
    config: RunConfig,
    folder: Path,
    *,
    space: Space,
    trials: int,
    count: int,
    updates: int,
    minutes: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Search, decide, recommend. Leaves ``recommended.yaml`` (ready to run), ``trials.json`` and a page in ``folder``.

    Raises:
        ValueError: no setting got through the cheap stage.
    """
    from pipeline.experiments.tune_codes_page import write_page

    started = time.monotonic()
    settings = space.settings(config, trials, config.seed)
    own = settings[0]
    found = search(config, settings, SEARCH_SHARE * 60 * minutes, say)
    chosen = finalists(found, count, own)
    if not chosen:
        reasons = {trial.error for trial in found if trial.error} or {
            "the time was over before one was cloned: give more --minutes"
        }
        raise ValueError(f"no setting got through the search: {'; '.join(sorted(reasons))}")
    played = decide(config, chosen, folder, updates=updates, deadline=started + 60 * minutes, say=say)
    best = recommended(played, own)
    (folder / "recommended.yaml").write_text(dump_config(tuned(config, best.settings)), encoding="utf-8")
    rest = [trial for trial in found if trial.settings not in [p.settings for p in played]]
    result = {
        "recommended": best.settings,
        "verdict": verdict(played, own),
        "own": own,
        "finalists": [asdict(trial) for trial in played],
        "stopped": [asdict(trial) for trial in rest],
        "minutes": (time.monotonic() - started) / 60,
        "config": str(folder / "recommended.yaml"),
        "page": str(folder / "codes.html"),
    }
    write_atomic(folder / "trials.json", json.dumps(result, indent=1).encode())
    write_page(result, folder)
    return result
