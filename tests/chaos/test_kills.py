"""Workers, learner, replay buffer and driver are killed, workers stopped; the end is that of a run that nothing
befell."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pytest
import scenarios
from chaos_tools import EVERY, LEARNER, REPLAY, UPDATES, WORKER, Run, assert_undisturbed, assert_whole, running

from pipeline.integrity.diagnose import diagnose
from pipeline.runs.events import read_events

pytest_plugins = ("rl_fixtures",)
pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]


def kinds(run: Run) -> list[str]:
    return [event["kind"] for event in read_events(run.folder)]


def test_killed_and_stopped_workers_cost_nothing(whole: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Two are killed; a third is stopped (SIGSTOP), noticed as silent, and replaced."""
    run = Run(tmp_path / "run", tiny_checkpoint, "cluster.worker_timeout_seconds=4").start()
    with running(run):
        for update in (2, 5):
            run.reach(update)
            run.actors(WORKER)[0].kill()
        run.reach(8)
        stopped = run.actors(WORKER)[0]
        stopped.suspend()
        run.reach(UPDATES)
        if stopped.is_running():
            stopped.kill()
        run.end()
    assert_undisturbed(run, whole)
    assert kinds(run).count("worker_lost") >= 1
    assert diagnose(run.folder).state == "finished"


def test_lost_learner_and_lost_replay_buffer_are_rebuilt_from_the_newest_checkpoint(
    whole: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", tiny_checkpoint, "cluster.num_learners=1", "rollout.cpus_per_worker=0.5").start()
    with running(run):
        run.reach(EVERY + 1)
        run.actors(LEARNER)[0].kill()
        time.sleep(3.0)
        run.reach(2 * EVERY + 2)  # what update 9 brought is in its memory, not on the disk
        run.actors(REPLAY)[0].kill()
        run.end()
    assert kinds(run).count("rebuilt") == 2
    assert_undisturbed(run, whole)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_silent_learner_is_named_and_rebuilt(tiny_checkpoint: Path, tmp_path: Path, mode: str) -> None:
    """Stopped (SIGSTOP) in the midst of it."""
    settings = [
        "cluster.num_learners=1",
        "rollout.cpus_per_worker=0.5",
        "cluster.learner_timeout_seconds=10",
        f"improve.mode={mode}",
    ]
    run = Run(tmp_path / "run", tiny_checkpoint, *settings).start()
    with running(run):
        run.reach(EVERY + 1)
        run.actors(LEARNER)[0].suspend()
        run.end()
    assert kinds(run).count("learner_silent") == kinds(run).count("rebuilt") == 1
    assert_whole(run, UPDATES)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_stopped_run_leaves_within_ten_seconds_and_goes_on(tiny_checkpoint: Path, tmp_path: Path, mode: str) -> None:
    assert max(scenarios.seconds_to_leave(tmp_path, tiny_checkpoint, mode, times=2)["seconds"]) < 10


def test_an_exception_ends_everything_within_ten_seconds(tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = scenarios.seconds_from_exception(tmp_path, tiny_checkpoint)
    assert found["seconds"][0] < 10 and "KeyError: 'no such key'" in found["error"]


def test_twenty_killed_workers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """0 rollouts lost or doubled, the right number of updates, full strength within 10 s each (median)."""
    found = scenarios.worker_kills(tmp_path, tiny_checkpoint, kills=20, last=5)
    assert found["rollouts lost"] == found["rollouts doubled"] == 0
    assert statistics.median(found["seconds"]) < 10


def test_driver_killed_at_ten_random_points(whole: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert scenarios.driver_kills(tmp_path, tiny_checkpoint, whole, points=10)["bit-equal"] == 10


def test_a_store_that_is_away_for_a_third_of_the_run_has_everything_once_afterwards(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    assert scenarios.store_away(tmp_path, tiny_checkpoint, updates=90)["status"] == "FINISHED"
