"""One policy among those that are trained at once: its run, from its folder to its place in the bank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from configs.loading import load_config
from configs.schema import RunConfig
from latent_control.pretrained import load_policy, weights_hash
from pipeline.bank.board import MemberDisplay
from pipeline.bank.inbox import ask
from pipeline.bank.tasks import MemberTask
from pipeline.bank.turns import TakesTurns
from pipeline.rl.shared_pool import Share
from pipeline.run import begin, execute, nothing_left
from pipeline.runs import interrupts
from pipeline.runs.errors import RunError, first_line
from pipeline.runs.events import Say
from pipeline.runs.layout import CONFIG, METRICS
from pipeline.runs.metrics_log import ends, series
from pipeline.runs.process import at_work
from pipeline.runs.repair import mend
from pipeline.runs.stage_table import IMPROVE
from pipeline.runs.starts import noted
from pipeline.serving import bank as banks
from pipeline.serving.export import find

STARTS = ".starts"
"""Folder for the checkpoints of members that others start from; no policy can be called so."""


class MemberEnded(RunError):
    """One policy's run ended before its time; the others' has nothing to do with it."""


@dataclass(kw_only=True)
class Trainee:
    """One policy while it is trained."""

    name: str
    config: RunConfig
    """Its number types decided"""
    run_dir: Path
    display: MemberDisplay
    state: Literal["ahead", "training", "finished", "stopped", "failed"] = "ahead"
    reason: str = ""
    """Why it failed"""
    member: str = ""
    """``NAME@VERSION`` in the bank, once it has finished"""
    turns: TakesTurns | None = field(default=None, repr=False)

    def summary(self) -> dict[str, Any]:
        """How it ended, for programs and tables; rewards are the means of the first and the last updates."""
        rewards = series(self.run_dir / METRICS, IMPROVE, "reward")
        first, last = ends(rewards) if rewards else (None, None)
        return {
            "name": self.name,
            "state": self.state,
            "reason": self.reason,
            "member": self.member,
            "updates": len(rewards),
            "reward_first": first,
            "reward_last": last,
            "run": str(self.run_dir),
        }

    def start(self, bank: Path, share: Share) -> None:
        """Let it work up to where it waits for the first time."""
        self.state = "training"
        self.turns = TakesTurns(partial(self._work, bank, share))
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
                    execute(self.config, self.run_dir, self.display, share)
            self.member = added(bank, self.name, self.run_dir)
        except Exception as error:  # a defect too: it ends this policy, not the others
            raise MemberEnded(first_line(getattr(error, "cause", None) or error)) from error


def added(bank: Path, name: str, run_dir: Path) -> str:
    """``NAME@VERSION`` of a finished run's policy in the bank, which is added unless an earlier start did that."""
    source = find(run_dir)
    digest = weights_hash(load_policy(source.checkpoint).state_dict().items())
    for number, known in banks.read_index(bank).members.get(name, {}).items():
        if known == digest:
            return f"{name}@{number}"
    return banks.add(bank, name, source)


def prepared(bank: Path, tasks: Sequence[MemberTask], out: Path, say: Say) -> list[Trainee]:
    """A run folder for each task, or the one that an earlier start has begun."""
    for task in tasks:
        run_dir = out / task.name
        run_dir.mkdir(parents=True, exist_ok=True)
        if not (run_dir / CONFIG).is_file():
            begin(_started(bank, task, out), run_dir)
    return [trainee_in(out / task.name, say) for task in tasks]


def trainee_in(run_dir: Path, say: Say) -> Trainee:
    """The policy whose run folder this is."""
    config = load_config(run_dir / CONFIG, check_paths=False)
    return Trainee(name=run_dir.name, config=config, run_dir=run_dir, display=MemberDisplay(run_dir.name, say))


def hand_over(bank: Path, tasks: Sequence[MemberTask], out: Path) -> None:
    """Give tasks to the training that is at work in ``out``."""
    for trainee in prepared(bank, tasks, out, lambda *_, **__: None):
        ask(out, trainee.name, "start")


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
