"""``latent-control bank train``: many policies of one bank trained at once.

One group of rollout workers samples for all of them; this process is the learner of all of them. Each policy is an
ordinary run in a folder of its own, whose loop is that of a run alone: where it waits for rollouts, the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from configs.loading import load_config
from configs.schema import RunConfig
from latent_control.pretrained import load_policy, read_shape, weights_hash
from pipeline.bank.board import Board, MemberDisplay
from pipeline.bank.tasks import MemberTask
from pipeline.bank.turns import Turns, give_way
from pipeline.cluster.connect import connected
from pipeline.cluster.shared_storage import require_shared_storage
from pipeline.console.displays import Display
from pipeline.replay.actor import SharedReplayActor
from pipeline.rl.config import shared_workers
from pipeline.rl.rollout_pool import this_node
from pipeline.rl.shared_pool import Share, SharedPool
from pipeline.rl.watchdog import Watchdog
from pipeline.rl.worker_health import Health
from pipeline.run import begin, nothing_left, run_stages
from pipeline.runs import interrupts
from pipeline.runs.environment import calm_libraries
from pipeline.runs.errors import RunError, first_line
from pipeline.runs.events import Say
from pipeline.runs.layout import CONFIG, METRICS
from pipeline.runs.metrics_log import series
from pipeline.runs.process import at_work
from pipeline.runs.repair import mend
from pipeline.runs.stage_table import IMPROVE
from pipeline.runs.starts import note_end, noted
from pipeline.serving import bank as banks
from pipeline.serving.export import find
from pipeline.stages.improve import RECENT, beside_driver, mean
from rollout_workers.model_host import WorkerSettings
from rollout_workers.rollouts import HostSpec

STARTS = "starts"
"""Folder for the checkpoints of members that others start from."""
LOOK = 0.1
"""Seconds to wait for rollouts before it is looked after everything else."""


class MemberEnded(RunError):
    """One policy's run ended before its time; the others' has nothing to do with it."""


@dataclass(kw_only=True)
class Trainee:
    """One policy while it is trained."""

    name: str
    config: RunConfig
    """Its number types decided"""
    run_dir: Path
    display: Display
    state: Literal["ahead", "training", "finished", "stopped", "failed"] = "ahead"
    reason: str = ""
    """Why it failed"""
    member: str = ""
    """``NAME@VERSION`` in the bank, once it has finished"""
    turns: Turns | None = field(default=None, repr=False)

    def summary(self) -> dict[str, Any]:
        """How it ended, for programs and tables; rewards are the means of the first and the last updates."""
        rewards = series(self.run_dir / METRICS, IMPROVE, "reward")
        return {
            "name": self.name,
            "state": self.state,
            "reason": self.reason,
            "member": self.member,
            "updates": len(rewards),
            "reward_first": mean(rewards[:RECENT]) if rewards else None,
            "reward_last": mean(rewards[-RECENT:]) if rewards else None,
            "run": str(self.run_dir),
        }

    def start(self, bank: Path, share: Share) -> None:
        """Let it work up to where it waits for the first time."""
        self.state = "training"
        self.turns = Turns(partial(self._work, bank, share))
        self.go_on()

    def go_on(self) -> None:
        """Let it work until it waits again; its end is noted here."""
        assert self.turns is not None
        self._until_it_waits(self.turns.go_on)

    def abort(self, error: BaseException) -> None:
        """End it where it waits."""
        if self.turns is not None and not self.turns.ended:
            self._until_it_waits(partial(self.turns.abort, error))

    def _until_it_waits(self, work: Any) -> None:
        assert self.turns is not None
        try:
            work()
        except interrupts.Stopped:
            self.state = "stopped"
        except MemberEnded as ended:
            self.state, self.reason = "failed", first_line(ended)
        else:
            self.state = "finished" if self.turns.ended else self.state

    def _work(self, bank: Path, share: Share) -> None:
        """The run, from its start or its newest checkpoint to its place in the bank."""
        try:
            if not nothing_left(self.run_dir):
                with at_work(self.run_dir), noted(self.run_dir):
                    mend(self.run_dir, restore_config=False)
                    run_stages(self.config, self.run_dir, self.display, share)
            self.member = added(bank, self.name, self.run_dir)
        except Exception as error:
            raise MemberEnded(first_line(getattr(error, "cause", None) or error)) from error


def added(bank: Path, name: str, run_dir: Path) -> str:
    """``NAME@VERSION`` of a finished run's policy in the bank, which is added unless an earlier start did that."""
    source = find(run_dir)
    digest = weights_hash(load_policy(source.checkpoint).state_dict().items())
    for number, known in banks.read_index(bank).members.get(name, {}).items():
        if known == digest:
            return f"{name}@{number}"
    return banks.add(bank, name, source)


def prepared(bank: Path, tasks: Sequence[MemberTask], out: Path, displays: Sequence[Display]) -> list[Trainee]:
    """A run folder for each task, or the one that an earlier start has begun."""
    trainees = []
    for task, display in zip(tasks, displays, strict=True):
        run_dir = out / task.name
        run_dir.mkdir(parents=True, exist_ok=True)
        begun = (run_dir / CONFIG).is_file()
        config = (
            load_config(run_dir / CONFIG, check_paths=False) if begun else begin(_started(bank, task, out), run_dir)
        )
        trainees.append(Trainee(name=task.name, config=config, run_dir=run_dir, display=display))
    return trainees


def _started(bank: Path, task: MemberTask, out: Path) -> RunConfig:
    """The task's config, with the policy that it starts from as a checkpoint."""
    if not task.start:
        return task.config
    member = banks.read_index(bank).resolve(task.start)
    folder = out / STARTS / member
    if not folder.exists():
        banks.take(bank, member, folder)
    actions = task.config.actions
    assert actions is not None
    return task.config.model_copy(update={"actions": actions.model_copy(update={"init": str(folder)})})


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
        displays = [MemberDisplay(task.name, say) for task in tasks]
        trainees = prepared(bank, tasks, out, displays)
        config = trainees[0].config
        with interrupts.listening(partial(_last_words, trainees)), connected(config):
            if config.cluster.address != "local":
                require_shared_storage(config, out)
            torch.set_num_threads(config.cluster.learner_threads)
            with _sharing(bank, config, say) as sharing, Watchdog(out, config.cluster.stall_seconds) as watchdog:
                _take_turns(bank, trainees, sharing, Board(displays, say), watchdog)
            interrupts.check()
    return trainees


def _take_turns(bank: Path, trainees: Sequence[Trainee], sharing: Sharing, board: Board, watchdog: Watchdog) -> None:
    """Start all, then let each go on whenever rollouts have come, until all have ended."""
    steps = 0
    try:
        for trainee in trainees:
            interrupts.check()
            trainee.start(bank, sharing.share(trainee.name))
        while working := [trainee for trainee in trainees if trainee.state == "training"]:
            sharing.pool.poll(LOOK)
            for trainee in working:
                trainee.go_on()
            if board.steps != steps:
                steps = board.steps
                watchdog.pat()
            board.look(len(working), len(trainees) - len(working))
    except BaseException as error:
        for trainee in trainees:
            trainee.abort(error)
        raise


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
