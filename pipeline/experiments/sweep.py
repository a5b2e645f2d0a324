"""Runs over a grid of config values: separate runs, in parallel as Ray Tune finds resources; an interrupted sweep
resumes.

What is known lies in the runs' folders. Tune's own state, which it pickles, is thrown away: finished runs are read,
broken ones resumed.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from configs.gates import LESS_IS_BETTER, measure_problems
from configs.loading import dump_config, load_config
from configs.schema import RunConfig
from pipeline.cluster.connect import connected, cpus_wanted
from pipeline.evaluation.gates import ALIASES, final_of, measure_of
from pipeline.runs.layout import CONFIG, METRICS
from pipeline.runs.metrics_log import series
from pipeline.runs.stage_table import IMPROVE
from pipeline.runs.status import finished
from pipeline.runs.summary import read_summary
from pipeline.storage.atomic import write_atomic

SWEEP, REWARD = "sweep.json", "reward"
LAST = 20
"""Updates over which the measure ``reward`` is a mean."""

Choice = dict[str, Any]
"""Config keys and values, e.g. ``{"improve.learning_rate": 1e-4}``."""


@dataclass(frozen=True, kw_only=True)
class SweepTrial:
    """One run of a sweep. ``SweepTrial(name="03", choice={"improve.learning_rate": 1e-4}, value=0.61, low=0.57,
    high=0.65, error=None)``."""

    name: str
    """Of its folder."""
    choice: Choice
    value: float | None = None
    low: float | None = None
    high: float | None = None
    """95 % interval over the held-out prompts, where the measure has one."""
    error: str | None = None


def parse_range(text: str) -> tuple[str, list[Any]]:
    """``"improve.learning_rate=1e-4,5e-4"`` or ``"rollout.stop=[[A, B], [C]]"`` -> (key, values).

    Raises:
        ValueError: no key, or fewer than one value.
    """
    key, sign, listed = text.partition("=")
    listed = listed.strip()
    try:
        values = yaml.safe_load(listed if listed.startswith("[") else f"[{listed}]") if sign else None
    except yaml.YAMLError:
        values = None
    if not key.strip() or not isinstance(values, list) or not values:
        raise ValueError(
            f"--try is {text!r}; write a config key and its values, e.g. --try improve.learning_rate=1e-4,5e-4"
        )
    return key.strip(), values


def choices(ranges: Sequence[tuple[str, list[Any]]], samples: int | None, seed: int) -> list[Choice]:
    """The whole grid, or ``samples`` of its points drawn without replacement.

    Raises:
        ValueError: a key is named twice.
    """
    keys = [key for key, _ in ranges]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"--try names {', '.join(twice)} twice: put all values behind one")
    grid = [dict(zip(keys, point, strict=True)) for point in itertools.product(*(values for _, values in ranges))]
    return grid if samples is None or samples >= len(grid) else random.Random(seed).sample(grid, samples)


def overrides(choice: Choice) -> list[str]:
    """``section.key=value`` as ``load_config`` reads it."""
    return [f"{key}={json.dumps(value)}" for key, value in choice.items()]


def planned(config: Path, base: Sequence[str], wanted: Sequence[Choice], folder: Path) -> list[SweepTrial]:
    """The sweep's trials; ``sweep.json`` remembers them, so that the same command resumes an interrupted sweep.

    Raises:
        ValueError: ``folder`` holds another sweep.
    """
    width = len(str(len(wanted) - 1))
    trials = [SweepTrial(name=f"{number:0{max(2, width)}d}", choice=choice) for number, choice in enumerate(wanted)]
    asked = {"config": dump_config(load_config(config, base)), "choices": [trial.choice for trial in trials]}
    file = folder / SWEEP
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if {key: before.get(key) for key in asked} != asked:
            raise ValueError(
                f"{folder} holds a sweep of another config or other values: give another --out, or the "
                "same command as then"
            )
        return trials
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no sweep; give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(asked, indent=1).encode())
    return trials


def trial_config(config: Path, base: Sequence[str], trial: SweepTrial, sweep: str) -> RunConfig:
    """A trial's config, tagged in MLflow with the sweep's name and each value that is tried."""
    made = load_config(config, [*base, *overrides(trial.choice)])
    tags = {"sweep": sweep, "trial": trial.name} | {key: str(value) for key, value in trial.choice.items()}
    return made.model_copy(update={"tracking": made.tracking.model_copy(update={"tags": made.tracking.tags | tags})})


def done(folder: Path, config: RunConfig) -> bool:
    """Whether the run in ``folder`` has all its stages and its evaluation."""
    return finished(config, read_summary(folder))


def require_metric(config: RunConfig, metric: str) -> None:
    """``ValueError`` where a run of ``config`` has no such measure to compare by."""
    if metric != REWARD:
        problems = list(measure_problems(config, metric))
    else:
        problems = [] if config.improve is not None else ["the config has no improve, so no reward"]
    if problems:
        raise ValueError(f"--metric {'; '.join(problems)}")


def ranked(trials: Sequence[SweepTrial], metric: str) -> list[SweepTrial]:
    """Best value first, of costs and losses the smallest; those without one last."""
    sign = 1 if metric.rpartition(".")[2] in LESS_IS_BETTER else -1
    return sorted(trials, key=lambda trial: (trial.value is None, sign * (trial.value or 0.0), trial.name))


def measured(folder: Path, metric: str) -> tuple[float | None, float | None, float | None]:
    """(value, low, high) of a finished run: ``reward``, or a measure of its evaluation, ``[variant.]measure`` as in
    gates."""
    if metric == REWARD:
        rewards = series(folder / METRICS, IMPROVE, REWARD)[-LAST:]
        return (statistics.mean(rewards) if rewards else None), None, None
    evaluation = read_summary(folder).get("evaluation") or {}
    variant, _, name = metric.rpartition(".")
    row: Mapping[str, Any] = evaluation.get(variant or final_of(evaluation), {}) if evaluation else {}
    low, high = row.get(f"{ALIASES.get(name, name)}_interval") or (None, None)
    return measure_of(row, name), low, high


def sweep(
    configs: Mapping[str, RunConfig],
    trials: Sequence[SweepTrial],
    folder: Path,
    *,
    metric: str,
    at_once: int | None,
    say: Callable[[str], None],
) -> list[SweepTrial]:
    """Run, resume or read every trial; best value first, those without one last.

    Args:
        configs: by the trials' names.
        at_once: trials side by side; ``None``: as many as the CPUs of the cluster allow.
    """
    import ray
    from ray import tune

    from pipeline.console.displays import Display
    from pipeline.run import resume, run

    def play(chosen: dict[str, str]) -> None:
        config, own = configs[chosen["name"]], folder / chosen["name"]
        _ = resume(own, Display()) if (own / CONFIG).is_file() else run(config, own, Display())
        tune.report({"done": 1})

    open_trials = [trial for trial in trials if not done(folder / trial.name, configs[trial.name])]
    say(f"sweep: {len(trials)} runs, {len(trials) - len(open_trials)} finished before")
    errors: dict[str, str] = {}
    if open_trials:
        first = next(iter(configs.values()))
        with connected(first), tempfile.TemporaryDirectory() as storage:
            room = max(1, int(ray.cluster_resources()["CPU"] // max(1.0, cpus_wanted(first))))
            results = tune.Tuner(
                tune.with_resources(play, tune.PlacementGroupFactory(bundles(first))),
                param_space={"name": tune.grid_search([trial.name for trial in open_trials])},
                tune_config=tune.TuneConfig(max_concurrent_trials=min(at_once or room, len(open_trials))),
                run_config=tune.RunConfig(
                    storage_path=storage, name="sweep", verbose=0, callbacks=[_progress(say, open_trials)]
                ),
            ).fit()
        errors = {result.config["name"]: _last_line(result.error) for result in results if result.error}
    judged = [
        SweepTrial(
            **{**vars(trial), **dict(zip(("value", "low", "high"), measured(folder / trial.name, metric), strict=True))}
        )
        if trial.name not in errors and done(folder / trial.name, configs[trial.name])
        else SweepTrial(**{**vars(trial), "error": errors.get(trial.name, "interrupted")})
        for trial in trials
    ]
    judged = ranked(judged, metric)
    write_atomic(
        folder / "result.json",
        json.dumps({"metric": metric, "trials": [asdict(trial) for trial in judged]}, indent=1).encode(),
    )
    return judged


def bundles(config: RunConfig) -> list[dict[str, float]]:
    """The resources of a run, as RLlib expects them inside Tune: a bundle for the driver, then one for each worker and
    learner."""
    rollout, cluster = config.rollout, config.cluster
    worker = {"CPU": rollout.cpus_per_worker, "GPU": float(rollout.gpus_per_worker)}
    learner = {"CPU": cluster.cpus_per_learner, "GPU": float(cluster.gpus_per_learner)}
    driver = {"CPU": 0.01, "GPU": 0.0 if cluster.num_learners else float(cluster.gpus_per_learner)}
    wanted = [driver, *[worker] * rollout.num_workers, *[learner] * cluster.num_learners]
    return [{kind: amount for kind, amount in bundle.items() if amount} for bundle in wanted]


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]


def _progress(say: Callable[[str], None], trials: Sequence[SweepTrial]) -> Any:
    from ray.tune import Callback

    named = {trial.name: ", ".join(f"{key}={value}" for key, value in trial.choice.items()) for trial in trials}

    class Progress(Callback):  # type: ignore[misc]
        """One line for each run that begins or ends."""

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            say(f"run {trial.config['name']} begins: {named[trial.config['name']]}")

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            say(f"run {trial.config['name']} is done ({1 + sum(t.is_finished() for t in trials)}/{len(trials)})")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            say(f"run {trial.config['name']} failed; it is resumed when the sweep is started again")

    return Progress()


def table(trials: Sequence[SweepTrial], metric: str) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of the result."""
    keys = list(trials[0].choice)

    def value(trial: SweepTrial) -> str:
        if trial.value is None:
            return trial.error or "not measured"
        return f"{trial.value:.3f}" + ("" if trial.low is None else f" ({trial.low:.3f} to {trial.high:.3f})")

    return ["run", *keys, metric], [
        [trial.name, *(str(trial.choice[key]) for key in keys), value(trial)] for trial in trials
    ]
