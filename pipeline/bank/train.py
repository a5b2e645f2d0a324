"""``latent-control bank train``: many policies of one bank trained at once.

One group of rollout workers samples for all of them; this process is the learner of all of them. Each policy is an
ordinary run in a folder of its own, whose loop is that of a run alone: where it waits for rollouts, the others go on.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from configs.schema import RunConfig
from latent_control.pretrained import read_shape
from pipeline.bank.board import Board
from pipeline.bank.inbox import Inbox
from pipeline.bank.tasks import MemberTask
from pipeline.bank.trainee import Trainee, prepared, trainee_in
from pipeline.bank.turns import give_way
from pipeline.cluster.connect import connected
from pipeline.cluster.shared_storage import require_shared_storage
from pipeline.replay.actor import SharedReplayActor, beside_driver
from pipeline.rl.config import shared_workers
from pipeline.rl.rollout_pool import this_node
from pipeline.rl.shared_pool import Share, SharedPool
from pipeline.rl.watchdog import Watchdog
from pipeline.rl.worker_health import Health
from pipeline.runs import interrupts
from pipeline.runs.environment import calm_libraries
from pipeline.runs.errors import first_line
from pipeline.runs.events import Say
from pipeline.runs.layout import CONFIG
from pipeline.runs.process import at_work
from pipeline.runs.starts import note_end
from pipeline.serving import bank as banks
from rollout_workers.model_host import WorkerSettings
from rollout_workers.rollouts import HostSpec

LOOK = 0.1
"""Seconds to wait for rollouts before it is looked after everything else."""


def train(bank: Path, tasks: Sequence[MemberTask], out: Path, *, say: Say) -> list[Trainee]:
    """Train all tasks, those of an earlier start from where they were; each policy that is finished becomes a version
    in ``bank``.

    Returns: how each task ended. One that failed (its verifier broke, its data is wrong) left the others alone.

    Raises:
        Stopped: the program was asked to end; what all had done is saved.
        RunError: the workers died too often, or none could start.
    """
    calm_libraries()
    out.mkdir(parents=True, exist_ok=True)
    with at_work(out):
        trainees = prepared(bank, tasks, out, say)
        config = trainees[0].config
        with interrupts.listening(partial(_last_words, trainees)), connected(config):
            if config.cluster.address != "local":
                require_shared_storage(config, out)
            torch.set_num_threads(config.cluster.learner_threads)
            with _sharing(bank, config, say) as sharing, Watchdog(out, config.cluster.stall_seconds) as watchdog:
                BankTraining(bank=bank, out=out, trainees=trainees, sharing=sharing, say=say).run(watchdog)
            interrupts.check()
    return trainees


@dataclass(frozen=True, kw_only=True)
class BankTraining:
    """Many runs that take turns."""

    bank: Path
    out: Path
    trainees: list[Trainee]
    """Those who come later are added"""
    sharing: Sharing
    say: Say

    def run(self, watchdog: Watchdog) -> None:
        """Start all, then let each go on whenever rollouts have come, until all have ended."""
        board, inbox, steps = Board(self.say), Inbox(self.out), 0
        try:
            for trainee in self.trainees:
                interrupts.check()
                trainee.start(self.bank, self.sharing.share(trainee.name))
            while working := [trainee for trainee in self.trainees if trainee.state == "training"]:
                self.sharing.pool.poll(LOOK)
                for trainee in working:
                    trainee.go_on()
                displays = [trainee.display for trainee in self.trainees]
                if board.steps(displays) != steps:
                    steps = board.steps(displays)
                    watchdog.pat()
                board.look(displays, at_work=len(working))
                for name, wanted in inbox.take().items():
                    self._heed(name, wanted)
        except BaseException as error:  # a signal too: no run may be left waiting for its turn
            for trainee in self.trainees:
                trainee.abort(error)
            raise

    def _heed(self, name: str, wanted: str) -> None:
        """Start or stop a policy by request."""
        known = {trainee.name: trainee for trainee in self.trainees}
        at_work = name in known and known[name].state == "training"
        if wanted == "stop" and at_work:
            known[name].abort(interrupts.Stopped(signal.SIGTERM, whole=True))
            self.say(f"{name}: stopped by request")
        elif wanted == "start" and not at_work and (self.out / name / CONFIG).is_file():
            try:
                trainee = trainee_in(self.out / name, self.say)
            except (ValueError, OSError) as error:
                self.say(f"{name}: cannot be started: {first_line(error)}")
                return
            self.say(f"{name}: started by request")
            self.trainees[:] = [one for one in self.trainees if one.name != name] + [trainee]
            trainee.start(self.bank, self.sharing.share(name))


def _last_words(trainees: Sequence[Trainee], name: str) -> None:
    for trainee in trainees:
        if trainee.state == "training":
            note_end(trainee.run_dir, "stopped", f"ended by {name}, in the middle of its work")
    interrupts.say_last(f"ended by {name}; the same command again goes on from the newest checkpoints")


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What all runs share: the workers, and the writer of their rollouts."""

    pool: SharedPool
    replay: Any
    """Handle of a ``SharedReplayActor``"""

    def share(self, name: str) -> Share:
        """What one run is given of it."""
        return Share(name=name, pool=self.pool, pause=give_way, replay=self.replay)


@contextmanager
def _sharing(bank: Path, config: RunConfig, say: Say) -> Iterator[Sharing]:
    """Workers in the bank's world, from their start to their end."""
    world, improve, cluster = bank / banks.WORLD, config.improve, config.cluster
    assert improve is not None
    host = HostSpec(
        level="latent",
        checkpoint=str(world),
        dtype=config.base.dtype,
        trust_remote_code=config.base.trust_remote_code,
    )
    dtype = "bfloat16" if improve.mixed_precision == "bf16" else "float32"
    settings = WorkerSettings(host=host, policy_dtype=dtype, task=config.task, rollout=config.rollout)
    started = time.perf_counter()
    with interrupts.at_once():
        group = shared_workers(config, settings, read_shape(world).num_actions)
    pool = SharedPool(
        group,
        rows_at_once=config.rollout.batch_size,
        timeout=cluster.worker_timeout_seconds,
        node=this_node(),
        health=Health(cluster),
    )
    pool.watch.report_to(say)
    say(f"{config.rollout.num_workers} rollout workers started in {time.perf_counter() - started:.0f} s")
    try:
        yield Sharing(pool=pool, replay=beside_driver(SharedReplayActor).remote())
    finally:
        pool.stop()
        group.stop()
