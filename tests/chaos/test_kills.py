"""Workers, learner, replay buffer and driver are killed, workers stopped; the end is that of a run that nothing befell."""

from __future__ import annotations

import random
import signal
import statistics
import time
from pathlib import Path

import psutil
import pytest
from chaos_tools import EVERY, LEARNER, REPLAY, UPDATES, WORKER, Run, assert_undisturbed, assert_whole, running

from pipeline.diagnose import diagnose
from pipeline.events import read_events

pytest_plugins = ("rl_fixtures",)
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Nothing befalls it."""
    run = Run(tmp_path_factory.mktemp("whole") / "whole", tiny_checkpoint).start()
    with running(run):
        run.end()
    assert_whole(run, UPDATES)
    return run


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_stopped_asynchronous_run_leaves_within_ten_seconds_and_goes_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", tiny_checkpoint, "improve.mode=async").start()
    with running(run):
        run.reach(6)
        run.signal(signal.SIGTERM)
        assert run.end(0) < 10
        assert diagnose(run.folder).state == "stopped" and diagnose(run.folder).next == f"latent-control resume {run.folder}"
        run.start().end()
    assert_whole(run, UPDATES)


@pytest.mark.slow
def test_twenty_killed_workers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """0 rollouts lost or doubled, the right number of updates, full strength within 10 s each (median)."""
    updates, kills = 400, 20
    run = Run(tmp_path / "run", tiny_checkpoint, f"improve.updates={updates}", "improve.checkpoint_every=50").start()
    chance, strength = random.Random(0), []
    with running(run):
        run.reach(2)
        for _ in range(kills):
            before = run.steps()[-1]
            victim = chance.choice(run.actors(WORKER))
            victim.kill()
            killed = time.monotonic()
            while len([one for one in run.actors(WORKER) if one.pid != victim.pid]) < 2 or not _serving(run, before):
                assert time.monotonic() - killed < 60, run.words()
                time.sleep(0.05)
            strength.append(time.monotonic() - killed)
            run.reach(before + 3)
        run.end(seconds=900)
    assert_whole(run, updates)
    losses = kinds(run).count("worker_lost")
    print(f"full strength after {statistics.median(strength):.1f} s (median), at most {max(strength):.1f} s; {losses} losses")
    assert statistics.median(strength) < 10


def _serving(run: Run, update: int) -> bool:
    """Whether both workers have answered since: their restarted actor is past its start when it has the class's title."""
    return run.steps()[-1] > update and all(one.status() != psutil.STATUS_ZOMBIE for one in run.actors(WORKER))


@pytest.mark.slow
def test_driver_killed_at_ten_random_points(whole: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    chance = random.Random(1)
    for number in range(10):
        run = Run(tmp_path / f"run-{number}", tiny_checkpoint).start()
        with running(run):
            run.reach(chance.randint(1, UPDATES - 1))
            time.sleep(chance.random() * 0.2)
            run.signal(signal.SIGKILL)
            run.end(-signal.SIGKILL)
            assert diagnose(run.folder).state == "killed"
            run.start().end()
        assert_undisturbed(run, whole)
