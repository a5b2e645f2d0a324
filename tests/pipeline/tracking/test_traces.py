"""Rollouts in MLflow: read back by its API they are the replay buffer's and the evaluation's."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from replay_rows import rollout

from configs.schema import RunConfig, Tracking
from pipeline.evaluation.outcome_file import write_outcomes
from pipeline.evaluation.outcomes import Outcome
from pipeline.replay.reader import ReplayReader
from pipeline.replay.writer import ReplayWriter
from pipeline.runs.layout import OUTCOMES, REPLAY
from pipeline.runs.stage_table import CLONE, EVALUATE, IMPROVE
from pipeline.tracking.stage_record import traces_of
from pipeline.tracking.tracker import Tracker

ROLLOUTS, PROMPTS = 40, 6


def outcome(variant: str, number: int) -> Outcome:
    return Outcome(
        variant=variant,
        mode="sampled",
        prompt_id=f"countdown/heldout/{number}",
        sample=0,
        success=number % 2 == 0,
        reward=None if number == 3 else float(number % 2 == 0),
        reward_parts={"format": 0.5},
        response=f"answer {number} of {variant}",
        prompt=f"prompt {number}",
        new_tokens=3,
    )


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A run folder and its MLflow runs: 12 of 40 rollouts, and 4 of the evaluation's 12."""
    run_dir = tmp_path_factory.mktemp("runs") / "first"
    run_dir.mkdir()
    writer = ReplayWriter(run_dir / REPLAY, 16, "first-improve")
    writer.add([rollout(n, failure="Timeout: 1 s" if n == 0 else None) for n in range(ROLLOUTS)])
    writer.add([rollout(99, level="token", reward=None)])
    writer.close()
    outcomes = [outcome(variant, number) for variant in ("base", "improved") for number in range(PROMPTS)]
    write_outcomes(run_dir / OUTCOMES, outcomes)
    tracker, ids = Tracker(Tracking(), run_dir, group="first"), {}
    for stage, most in ((IMPROVE, 12), (EVALUATE, 5)):
        config = RunConfig(base={"model": "x"}, actions={}, improve={}, tracking={"traces": most})
        for _ in range(2):  # a resumed run, or sync, sends them again
            ids[stage] = tracker.start(stage, params={}, tags={})
            tracker.finish("FINISHED", patience=60, traces=traces_of(config, run_dir, stage))
            tracker.settle(120)
    assert tracker.lost() == ""
    tracker.close()
    return run_dir, ids


def found(run_dir: Path, run_id: str, more: str = "") -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    places = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_traces(locations=places, filter_string=f"attributes.run_id = '{run_id}'{more}"))


def scores(trace: Any) -> dict[str, Any]:
    return {one.name: one.value for one in trace.info.assessments}


def test_traces_are_the_replay_buffers_rows(tracked):
    run_dir, ids = tracked
    rows = {row["rollout_id"]: row for row in ReplayReader(run_dir / REPLAY, shuffle=False).rows()}
    traces = found(run_dir, ids[IMPROVE])
    numbers = sorted(int(trace.info.tags["rollout_id"].partition("/")[2]) for trace in traces)
    # 12 of 0 to 39, evenly: every 39/11th
    assert numbers == [0, 4, 7, 11, 14, 18, 21, 25, 28, 32, 35, 39]
    for trace in traces:
        row, (span,) = rows[trace.info.tags["rollout_id"]], trace.data.spans
        assert span.inputs == {"prompt": row["prompt_text"]}
        wanted = {"response": row["text"], "codes": row["actions"].tolist(), "reward_parts": row["reward_parts"]}
        assert span.outputs == wanted | ({"failure": row["failure"]} if row["failure"] else {})
        assert scores(trace) == {"reward": row["reward"], "success": row["success"]}
        for name in ("group_id", "prompt_id", "finish_reason", "policy_version"):
            assert trace.info.tags[name] == str(row[name])
        assert trace.info.request_time == round(1000 * row["created"].timestamp())
        assert (trace.info.request_preview, trace.info.response_preview) == (row["prompt_text"], row["text"])


def test_heldout_traces_are_the_evaluations_whole_prompts(tracked):
    run_dir, ids = tracked
    traces = found(run_dir, ids[EVALUATE])
    told = {(trace.info.tags["model"], trace.info.tags["prompt_id"]): trace for trace in traces}
    # 5 allow two prompts with both models: the first and the last
    assert set(told) == {(model, f"countdown/heldout/{n}") for model in ("base", "improved") for n in (0, 5)}
    trace = told["improved", "countdown/heldout/0"]
    assert trace.data.spans[0].outputs == {"response": "answer 0 of improved", "reward_parts": {"format": 0.5}}
    assert scores(trace) == {"reward": 1.0, "success": True} and trace.info.tags["mode"] == "sampled"


def test_mlflow_filters_by_tags_and_by_reward(tracked):
    run_dir, ids = tracked
    (one,) = found(run_dir, ids[IMPROVE], " and tags.rollout_id = 'run/7'")
    assert one.data.spans[0].name == "rollout"
    solved = found(run_dir, ids[EVALUATE], " and feedback.reward = '1.0'")
    assert {trace.info.tags["prompt_id"] for trace in solved} == {"countdown/heldout/0"}


def test_there_are_none_where_the_setting_says_so(tmp_path):
    off = RunConfig(base={"model": "x"}, actions={}, improve={}, tracking={"traces": 0})
    assert traces_of(off, tmp_path, IMPROVE) is None
    on = off.model_copy(update={"tracking": Tracking()})
    assert traces_of(on, tmp_path, CLONE) is None
    for stage in (IMPROVE, EVALUATE):  # neither a replay buffer nor an evaluation
        read = traces_of(on, tmp_path, stage)
        assert read is not None and read() == []


def test_reading_and_storing_delay_nothing(tmp_path):
    tracker, going_on = Tracker(Tracking(), tmp_path, group="slow"), threading.Event()

    def traces() -> list[Any]:
        going_on.wait(60)
        return []

    tracker.start(IMPROVE, params={}, tags={})
    tracker.finish("FINISHED", patience=60)
    tracker.start(IMPROVE, params={}, tags={})
    began = time.monotonic()
    assert tracker.finish("FINISHED", patience=60, traces=traces)
    assert time.monotonic() - began < 30
    tracker.start(EVALUATE, params={}, tags={}, patience=0.0)
    tracker.log({"loss": 0.5}, 1)  # returns though the queue stands still
    going_on.set()
    assert tracker.finish("FINISHED", patience=60)
    tracker.close()
