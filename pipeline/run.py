"""A run: all stages that a config names, in order, each done once, whatever interrupts it."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.checks import simulation_warning
from configs.loading import dump_config, load_config
from configs.schema import RunConfig
from pipeline.cluster.connect import connected, is_connected
from pipeline.cluster.shared_storage import require_shared_storage
from pipeline.console.displays import Display, automatic
from pipeline.console.progress import Ahead
from pipeline.evaluation.gates import judgement
from pipeline.pages.explorer.write import wants_page, write_at_end
from pipeline.pages.report.write import write_at_end as write_report
from pipeline.preflight.base_model import tuned_start
from pipeline.preflight.number_type import decided
from pipeline.rl.rollout_metrics import tied_warning
from pipeline.runs import interrupts, manifest, seals
from pipeline.runs.context import StageContext, StageResult
from pipeline.runs.environment import calm_libraries, peak_gib, write_environment
from pipeline.runs.events import Events
from pipeline.runs.folder_name import name_problem
from pipeline.runs.forecast import START, evaluation_rollouts, expected_seconds, pages_seconds
from pipeline.runs.layout import CHECKPOINTS, CONFIG, EVALUATION, MANIFEST, METRICS, OUTCOMES, SUMMARY, stage_record
from pipeline.runs.metrics_log import RunLog
from pipeline.runs.process import at_work
from pipeline.runs.repair import mend
from pipeline.runs.stage_table import BASE, EVALUATE, ONLINE, PAGES, start_of
from pipeline.runs.starts import note_end, noted
from pipeline.runs.status import finished as has_finished
from pipeline.runs.summary import read_summary
from pipeline.stages.base_model import resolve_base
from pipeline.stages.evaluate import evaluate_stage
from pipeline.stages.plan import plan, work_of
from pipeline.storage import checkpoints
from pipeline.tracking.mirrors import Mirrors
from pipeline.tracking.stage_record import note_result, tracking
from pipeline.tracking.tracker import Tracker
from pipeline.tracking.uris import flatten
from rollout_workers.tasks import build_task


def run(config: RunConfig, run_dir: Path, display: Display | None = None) -> Path:
    """Run all stages in a new folder ``run_dir`` and return it, in the number types that are fast here where the config
    says ``auto``. ``display``: how to show it; None decides by what stdout is.

    Raises:
        ValueError: the folder holds a run already, or its name is not one that every part of a run can be given.
        AtWorkError: another process works on it.
    """
    if problem := name_problem(run_dir, config):
        raise ValueError(problem)
    run_dir.mkdir(parents=True, exist_ok=True)
    with at_work(run_dir):
        if (run_dir / CONFIG).exists():
            raise ValueError(
                f"{run_dir} holds a run already: continue it with latent-control resume {run_dir}, or name another "
                "folder"
            )
        config = begin(config, run_dir)
        with _supervised(config, run_dir):
            return execute(config, run_dir, display)


def begin(config: RunConfig, run_dir: Path) -> RunConfig:
    """Make ``run_dir``, which is empty, the folder of a run of ``config``; returns the config with its number types
    decided."""
    config, reasons = decided(config)
    text = "".join(f"# {reason}\n" for reason in reasons) + dump_config(config)
    manifest.put(run_dir, CONFIG, text.encode(), keep=True)
    for reason in reasons:
        Events(run_dir).note("number_type", reason)
    return config


def resume(run_dir: Path, display: Display | None = None, restore_config: bool = False) -> Path:
    """Continue an interrupted run: finished stages are kept, the broken one goes on from its newest valid checkpoint.
    Of a run that is finished and whole nothing is touched.

    Raises:
        ValueError: there is no run in ``run_dir``, its config was changed (``restore_config``: put back what it was),
            or the config says other settings than a finished stage was trained with.
        AtWorkError: another process works on it.
    """
    if not (run_dir / CONFIG).is_file() and manifest.kept(run_dir, CONFIG) is None:
        raise ValueError(f"no run in {run_dir}: {CONFIG} is missing")
    if nothing_left(run_dir):
        (display or automatic()).message(f"{run_dir.name} is finished: nothing left to do")
        return run_dir
    with at_work(run_dir):
        mend(run_dir, restore_config)
        config = load_config(run_dir / CONFIG, [], check_paths=False)
        with _supervised(config, run_dir):
            return execute(config, run_dir, display)


def nothing_left(run_dir: Path) -> bool:
    """Whether a run has all that its config names, and nothing of it is damaged."""
    if manifest.problems(run_dir):
        return False
    config, summary = load_config(run_dir / CONFIG, [], check_paths=False), read_summary(run_dir)
    pages = not (wants_page(config) or config.report.enabled) or PAGES in summary.get("took", ())
    results = [run_dir / CHECKPOINTS / stage.name for stage in plan(config, run_dir) if stage.name != BASE]
    return has_finished(config, summary) and pages and not any(checkpoints.verify(result) for result in results)


def execute(config: RunConfig, run_dir: Path, display: Display | None = None, workers: Any = None) -> Path:
    """Every stage that is not done yet, then the evaluation and the pages; ``summary.json`` grows with them. Its caller
    sees to signals, Ray, and what is noted of the end.

    Args:
        workers: rollout workers that the run shares with others (``pipeline.rl.shared_pool.Share``).
    """
    with _logged(config, run_dir, display, workers) as (context, tracker):
        # Of an earlier start: what is not made again stays, also if this start is interrupted while it makes the rest.
        summary: dict[str, Any] = read_summary(run_dir) | _warned(context) | {"stages": {}}
        made: dict[str, Path] = {}
        for stage in plan(config, run_dir):
            source, done = start_of(config, stage.name, made), finished(context, stage.name)
            kept = done is not None
            if not kept or config.evaluation is None:  # an evaluation is of the stages that there were
                for name in ("evaluation", "gates", "took", "collapse"):
                    summary.pop(name, None)
            if done is None:
                started = time.perf_counter()
                seals.stage_begins(run_dir, stage.name)
                with tracking(context, tracker, stage.name, source):
                    result = work_of(stage)(context, stage, source)
                    if stage.name != BASE:
                        note_result(tracker, context, result, source)
                done = _record(context, stage.name, result, time.perf_counter() - started)
            _include(context, summary, stage.name, *done, kept=kept)
            made[stage.name] = done[0].checkpoint
        _finish(context, tracker, summary)
    return run_dir


@contextmanager
def _supervised(config: RunConfig, run_dir: Path) -> Iterator[None]:
    """Begin and end are events, signals end the work in order, and a cluster is joined once."""
    calm_libraries()

    def last_words(name: str) -> None:
        note_end(run_dir, "stopped", f"ended by {name}, in the middle of its work")
        interrupts.say_last(f"ended by {name}; continue with: latent-control resume {run_dir}")

    with noted(run_dir), interrupts.listening(last_words):
        # Who has connected has looked at the storage, too; a local Ray that exports metrics does so from the start.
        if (config.cluster.address == "local" and config.cluster.metrics_port is None) or is_connected():
            yield
            return
        # One connection for all: between two, Ray would clear away the working directory that a job was sent with.
        with connected(config):
            require_shared_storage(config, run_dir)
            yield


@contextmanager
def _logged(
    config: RunConfig, run_dir: Path, display: Display | None, workers: Any
) -> Iterator[tuple[StageContext, Tracker]]:
    """What the stages write to: the run's log with its display, and MLflow."""
    write_environment(run_dir)
    events = Events(run_dir)
    tracker = Tracker(config.tracking, run_dir, group=run_dir.name, note=events.note)
    mirrors = Mirrors(config.tracking, run_dir, flatten(config.model_dump(mode="json")), events.note)
    log = RunLog(run_dir, tracker=tracker, mirror=mirrors, display=display, events=events)
    with log.showing(ahead(config, run_dir)):
        log.message(f"watch it: latent-control watch {shlex.quote(str(run_dir))}")
        try:
            task = build_task(config.task)
            yield StageContext(config=config, run_dir=run_dir, log=log, task=task, workers=workers), tracker
            tracker.settle()
        finally:
            note_lost(log, run_dir, tracker.lost())
            tracker.close()
            mirrors.close()
    log.close()


def note_lost(log: RunLog, run_dir: Path, lost: str) -> None:
    """Keep in the summary and in the events what the tracking store lacks of a run."""
    summary = read_summary(run_dir)
    if lost:
        log.message(lost, "tracking_lost")
    if summary.get("tracking", "") != lost:
        manifest.put_json(run_dir, SUMMARY, summary | {"tracking": lost})


def ahead(config: RunConfig, run_dir: Path) -> Ahead:
    """What a display shows before the run starts."""
    stages = {stage.name: int(stage.settings(config).updates) for stage in plan(config, run_dir)}
    stages |= {EVALUATE: 0} if config.evaluation is not None else {}
    rl = config.improve
    return Ahead(
        run_dir=run_dir,
        stages=stages | ({PAGES: 0} if wants_page(config) or config.report.enabled else {}),
        seconds=pages_seconds(config) | expected_seconds(run_dir, config),
        evaluation_rollouts=evaluation_rollouts(config),
        ray_start=START,
        num_actions=config.actions.num_actions if config.actions is not None else None,
        max_staleness=rl.max_staleness if rl is not None and rl.mode == "async" else None,
    )


def _warned(context: StageContext) -> dict[str, list[str]]:
    """The summary's ``warnings`` of what the config says, shown now."""
    warnings = simulation_warning(context.config) + tuned_start(context.config)
    for warning in warnings:
        context.log.message(warning)
    return {"warnings": warnings} if warnings else {}


def _include(
    context: StageContext, summary: dict[str, Any], stage: str, result: StageResult, seconds: float, *, kept: bool
) -> None:
    """Add a stage that is done, ``kept`` from an earlier start or not, to the summary."""
    config, run_dir, log = context.config, context.run_dir, context.log
    summary["stages"][stage] = _entry(context, result, seconds)
    log.done(stage, kept=kept, **summary["stages"][stage])
    if config.improve is not None and stage in ONLINE:
        for warning in tied_warning(stage, config.improve, result.metrics.get("tied_groups")):
            summary.setdefault("warnings", []).append(warning)
            log.message(warning)
    if not kept:
        manifest.put_json(run_dir, SUMMARY, summary)
    elif seals.unrecorded(run_dir, [stage]):  # of a version before, or the manifest was lost
        seals.stage_ended(run_dir, stage, Path(resolve_base(config)))


def _finish(context: StageContext, tracker: Tracker, summary: dict[str, Any]) -> None:
    """The evaluation, unless an earlier start did it and no stage was done since, and the pages."""
    config, run_dir, log = context.config, context.run_dir, context.log
    kept, took = evaluated(run_dir, summary), summary.setdefault("took", {})
    if config.evaluation is not None and summary["stages"].keys() - {BASE}:
        if not kept:
            with interrupts.at_once(), _timed(took, EVALUATE):
                summary["evaluation"], verdicts = evaluate_stage(context, tracker, summary)
            if config.gates:
                summary["gates"] = judgement(verdicts)
            manifest.put_json(run_dir, SUMMARY, summary)
        log.done(EVALUATE, kept=kept, seconds=took[EVALUATE])
        log.display.evaluation(summary["evaluation"])
    if wants_page(config) or config.report.enabled:
        log.begin(PAGES, 0)
        with interrupts.at_once(), _timed(took, PAGES):
            write_at_end(context)
            summary |= {name: found for name, found in read_summary(run_dir).items() if name == "collapse"}
            write_report(context)  # it links to the explorer
        log.done(PAGES, seconds=took[PAGES])
    manifest.put_json(run_dir, SUMMARY, summary)


def evaluated(run_dir: Path, summary: Mapping[str, Any]) -> bool:
    """Whether an earlier start evaluated all stages, under the config that the manifest has kept since."""
    there = {METRICS, EVALUATION, OUTCOMES} <= manifest.known(run_dir)
    damaged = manifest.problems(run_dir).keys() & {SUMMARY, EVALUATION, OUTCOMES}
    return there and not damaged and "evaluation" in summary and EVALUATE in summary.get("took", ())


@contextmanager
def _timed(took: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    took[name] = round(time.perf_counter() - started, 3)


def finished(context: StageContext, stage: str) -> tuple[StageResult, float] | None:
    """The result and the seconds of a stage that an earlier start of this run completed; a damaged record is made again
    from the result's manifest."""
    name, result, wrong = stage_record(stage), context.result(stage), manifest.problems(context.run_dir)
    problem = wrong.get(name)
    if not (context.run_dir / name).is_file() and not problem:
        return None
    other = wrong.get(f"{CHECKPOINTS}/{stage}/{MANIFEST}")
    if stage != BASE and (problems := checkpoints.verify(result) or ([f"its result {other}"] if other else [])):
        context.log.message(f"{stage}: {problems[0]}; the stage is done again", "result_damaged", stage=stage)
        return None
    if problem and stage == BASE:
        return None
    if problem:
        context.log.message(f"{stage}: {name} {problem}; made again from the result", "record_damaged", stage=stage)
        found = StageResult(checkpoint=result, metrics=checkpoints.read_info(result)["metrics"])
        manifest.put_json(context.run_dir, name, _entry(context, found, 0.0))
    saved = json.loads((context.run_dir / name).read_text())
    checkpoint = (context.run_dir / saved["checkpoint"]).resolve()
    return StageResult(checkpoint=checkpoint, metrics=saved["metrics"]), saved["seconds"]


def _record(context: StageContext, stage: str, result: StageResult, seconds: float) -> tuple[StageResult, float]:
    """Record that a stage is done; what ``finished`` will find."""
    seals.stage_ended(context.run_dir, stage, Path(resolve_base(context.config)))
    entry = _entry(context, result, seconds) | {"driver_peak_gib": peak_gib()}
    manifest.put_json(context.run_dir, stage_record(stage), entry)
    return result, seconds


def _entry(context: StageContext, result: StageResult, seconds: float) -> dict[str, Any]:
    checkpoint = os.path.relpath(result.checkpoint, context.run_dir)
    return {"seconds": seconds, "checkpoint": checkpoint, "metrics": result.metrics}
