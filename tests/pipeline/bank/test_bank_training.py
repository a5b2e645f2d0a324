"""Many policies trained at once: their files, the same weights as alone, and none notices what happens to another."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import ray
import torch
import yaml
from ray.rllib.core import DEFAULT_MODULE_ID
from rl_tools import NUM_ACTIONS, update
from typer.testing import CliRunner

from configs.loading import dump_config, load_config
from latent_control import LatentActionLM
from latent_control.pretrained import load_policy, read_shape
from pipeline.bank import inbox
from pipeline.bank.tasks import TaskErrors, read_tasks
from pipeline.bank.train import train
from pipeline.bank.trainee import Trainee, prepared
from pipeline.bank.turns import TakesTurns, give_way
from pipeline.cli.main import app
from pipeline.cli.session import examine_tasks
from pipeline.integrity.audit import audit
from pipeline.integrity.reproduce import repeat
from pipeline.rl.algorithm import LatentRL
from pipeline.rl.config import algorithm_config
from pipeline.rl.rollout_pool import FinishedRequest
from pipeline.runs.metrics_log import series
from pipeline.serving import bank as banks
from pipeline.serving.export import find
from pipeline.storage import checkpoints
from rollout_workers.rollouts import HostSpec, Rollout
from rollout_workers.tasks import build_task
from rollout_workers.tasks.rewards import reward_hash, unknown_parts

pytest_plugins = ("rl_fixtures",)

Tasks = Callable[..., list[Path]]


@pytest.fixture(scope="module")
def first_bank(tiny_base: Path, config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank without members on the tiny base LM."""
    root = tmp_path_factory.mktemp("banks")
    shape: dict[str, Any] = {"inverse_dynamics_layers": 1, "merge_layers": 1, "policy_layers": 1}
    model = LatentActionLM.from_base(
        tiny_base, num_actions=NUM_ACTIONS, seed=1, policy_kind="mlp", policy_width=24, **shape
    )
    model.codebook.data *= 8
    generator = torch.Generator().manual_seed(3)
    for weight in [*model.merge.parameters(), *model.policy.parameters()]:
        torch.nn.init.normal_(weight, std=0.2, generator=generator)
    run = root / "world"
    checkpoints.write(
        run / "checkpoints" / "clone",
        files=lambda staging: model.save_pretrained(staging) and None,
        info={"stage": "clone", "metrics": {}},
    )
    actions = {"num_actions": NUM_ACTIONS, "policy_kind": "mlp"}
    (run / "config.yaml").write_text(dump_config(config(actions=actions, clone={}, tracking={"enabled": False})))
    return banks.create(find(run), root / "bank")


@pytest.fixture
def bank(first_bank: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first_bank, tmp_path / "bank"))


REWARD = """
def reward(row, response):
    numbers = [int(word) for word in response.split() if word.isdigit()]
    return sum(number % 2 == row["answer"] for number in numbers) / 6
"""
BROKEN = """
def reward(row, response):
    raise RuntimeError("the judge is ill")
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Tasks:
    """``tasks(even={"improve": {"updates": 2}})``: a file ``even.yaml`` with these changes. Without them it rewards
    even numbers (``odd``: odd ones), over 3 updates of 4 x 4 rollouts of 6 tokens."""

    def write(**changes: dict[str, Any]) -> list[Path]:
        files = []
        for name, sections in changes.items():
            rows = [{"prompt": f"{n} {n + 1} -> {n + 2} :", "answer": int(name == "odd")} for n in range(40)]
            (tmp_path / f"{name}.jsonl").write_text("".join(map("{}\n".format, map(json.dumps, rows))))
            (tmp_path / f"{name}.py").write_text(REWARD)
            options = {"path": f"{name}.jsonl", "verifier": "python", "python": {"path": f"{name}.py"}}
            data: dict[str, Any] = {
                "task": {"name": "jsonl", "options": options},
                "improve": {"updates": 3, "prompts_per_update": 4, "group_size": 4, "learning_rate": 0.01},
                "rollout": {"num_workers": 2, "max_new_tokens": 6},
                "cluster": {"learner_threads": 1},
                "tracking": {"enabled": False},
            }
            for key, value in sections.items():
                data[key] = {**data.get(key, {}), **value} if isinstance(value, dict) else value
            files.append(tmp_path / f"{name}.yaml")
            files[-1].write_text(yaml.safe_dump(data))
        return files

    return write


def trained(bank: Path, files: list[Path], out: Path) -> dict[str, Trainee]:
    ended = train(bank, read_tasks(bank, files, [], out), out, say=lambda text, kind="", **facts: print(text))
    return {one.name: one for one in ended}


Recorded = dict[str, list[list[Rollout]]]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """By run, the rollouts that each of its updates was given."""
    found: Recorded = {}
    original = LatentRL._minibatches

    def spy(self: LatentRL, batch: list[FinishedRequest]) -> Any:
        name = str(self.run_config.task.options["path"])
        found.setdefault(Path(name).stem, []).append([r for one in batch for r in ray.get(one.rollouts)])
        return original(self, batch)

    monkeypatch.setattr(LatentRL, "_minibatches", spy)
    return found


def alone(run_dir: Path, batches: list[list[Rollout]]) -> dict[str, Any]:
    """The weights of a policy that is trained by itself on these rollouts, without workers."""
    config, start = load_config(run_dir / "config.yaml"), run_dir / "checkpoints" / "actions"
    assert config.improve is not None
    host = HostSpec(level="latent", checkpoint=str(start))
    rllib = algorithm_config(
        config,
        host,
        num_actions=NUM_ACTIONS,
        reads=read_shape(start).policy_state,
        late_blocks=0,
        learning_rate=config.improve.learning_rate,
    )
    learner = rllib.build_learner(spaces={DEFAULT_MODULE_ID: (rllib.observation_space, rllib.action_space)})
    for batch in batches:
        update(learner, batch)
    found: dict[str, Any] = learner.module[DEFAULT_MODULE_ID].get_state()
    return found


def test_two_policies_are_trained_at_once_and_join_the_bank(
    ray_session: None, bank: Path, tasks: Tasks, tmp_path: Path, recorded: Recorded
) -> None:
    """Small enough for every day."""
    one = {"rollout": {"num_workers": 1}}
    files = tasks(even=one | {"improve": {"updates": 2}}, odd=one | {"improve": {"updates": 1}})
    ended = trained(bank, files, tmp_path / "out")
    assert {name: (one.state, one.member) for name, one in ended.items()} == {
        "even": ("finished", "even@1"), "odd": ("finished", "odd@1")
    }  # fmt: skip
    weights = load_policy(tmp_path / "out" / "even" / "checkpoints" / "improve").state_dict()
    same = alone(tmp_path / "out" / "even", recorded["even"])
    assert all(torch.equal(weights[key], torch.from_numpy(value)) for key, value in same.items())


@pytest.mark.slow
def test_each_ends_as_if_alone_and_none_notices_what_happens_to_another(
    ray_session: None, bank: Path, tasks: Tasks, tmp_path: Path, recorded: Recorded
) -> None:
    """Two learn with different algorithms; the verifier of a third breaks, a fourth has a prompt too long for it."""
    files = tasks(
        even={},
        odd={"seed": 1, "improve": {"algorithm": "rloo", "features": "recompute", "epochs": 2, "updates": 4}},
        ill={},
        wordy={"task": {"max_prompt_tokens": 2}},
    )
    (tmp_path / "ill.py").write_text(BROKEN)
    out = tmp_path / "out"
    ended = trained(bank, files, out)
    assert {name: one.state for name, one in ended.items()} == {
        "even": "finished", "odd": "finished", "ill": "failed", "wordy": "failed"
    }  # fmt: skip
    assert "the judge is ill" in ended["ill"].reason and "more than task.max_prompt_tokens=2" in ended["wordy"].reason
    assert banks.read_index(bank).hashes().keys() == {"even@1", "odd@1"}
    record = banks.read_record(bank, "odd@1")
    assert (record["stage"], Path(record["run"]).name) == ("improve", "odd")
    for name in ("even", "odd"):
        weights = load_policy(out / name / "checkpoints" / "improve").state_dict()
        start = load_policy(out / name / "checkpoints" / "actions").state_dict()
        assert not torch.equal(weights["head.weight"], start["head.weight"])
        same = alone(out / name, recorded[name])
        assert all(torch.equal(weights[key], torch.from_numpy(value)) for key, value in same.items()), name
        assert {r.policy_version for r in recorded[name][2]} == {2}
        assert all(one.passed for one in audit(out / name))
    rewarded = {name: recorded[name][0][0].text for name in ("even", "odd")}
    assert rewarded["even"] != rewarded["odd"] or recorded["even"][0][0].reward != recorded["odd"][0][0].reward
    # From its ledger and its replay buffer, by workers and a learner of its own: hash by hash the same policies.
    again = repeat(out / "odd", "improve", stored=True, say=print)
    assert (again.updates, again.different) == (4, None)
    # With the remedy, the same command goes on: who had finished is neither trained nor added again.
    (tmp_path / "ill.py").write_text(REWARD)
    files[3].unlink()
    again_ended = trained(bank, files[:3], out)
    assert {one.state for one in again_ended.values()} == {"finished"}
    assert banks.read_index(bank).hashes().keys() == {"even@1", "odd@1", "ill@1"}


@pytest.mark.slow
def test_policies_stop_start_and_resume_while_others_train(bank: Path, tasks: Tasks, tmp_path: Path) -> None:
    """By the commands, as users call them: each training is a process of its own."""
    out, log = tmp_path / "out", tmp_path / "log"
    many = {"updates": 300, "checkpoint_every": 1000}
    even, odd, late = tasks(
        even={"improve": many}, odd={"improve": many | {"updates": 100}}, late={"improve": {"updates": 2}}
    )

    def command(*words: Any) -> list[str]:
        return [sys.executable, "-m", "pipeline", "bank", *map(str, words)]

    def call(*words: Any) -> str:
        done = subprocess.run(command(*words), capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 500
        while not condition():
            assert time.monotonic() < deadline and at_work.poll() is None, log.read_text()
            time.sleep(0.5)

    def updates(name: str) -> int:
        return len(series(out / name / "metrics.jsonl", "improve", "reward"))

    with log.open("w") as file:
        at_work = subprocess.Popen(command("train", bank, even, odd, "--out", out), stdout=file, stderr=file)
        wait(lambda: updates("even") > 1 and updates("odd") > 1)
        assert "asked to stop: odd" in call("stop", out, "odd")
        wait(lambda: "odd: stopped by request" in log.read_text())
        stopped = updates("odd")
        assert "handed over" in call("train", bank, late, "--out", out)
        wait(lambda: "late@1" in banks.read_index(bank).hashes())
        assert updates("odd") == stopped and updates("even") > stopped
        assert "handed over" in call("train", bank, odd, "--out", out)
        wait(lambda: updates("odd") > stopped)
        at_work.send_signal(signal.SIGTERM)
        assert at_work.wait(60) == 0, "the state is saved"
    assert checkpoints.newest_valid(out / "even" / "checkpoints", "improve")[0] is not None
    saved = updates("even")
    assert saved < 300
    call("train", bank, even, odd, late, "--out", out)
    assert banks.read_index(bank).hashes().keys() == {"even@1", "odd@1", "late@1"}
    assert (updates("even"), updates("odd"), updates("late")) == (300, 100, 2)
    assert all(one.passed for name in ("even", "odd") for one in audit(out / name)), "none lost, none doubled"


# -- task files --------------------------------------------------------------------------------------------------------


def wrong(bank: Path, files: list[Path], out: Path, *overrides: str) -> dict[str, str]:
    """What is said of each file, by its name."""
    with pytest.raises(TaskErrors) as caught:
        read_tasks(bank, files, overrides, out)
    return {file.stem: " | ".join(lines) for file, lines in caught.value.by_file.items()}


def test_everything_wrong_with_all_files_is_said_at_once(bank: Path, tasks: Tasks, tmp_path: Path) -> None:
    files = tasks(
        good={},
        typo={"improve": {"upates": 3}},
        other={"rollout": {"num_workers": 3}},
        base={"base": {"model": "x"}, "evaluation": {}},
        twice={"name": "good"},
        named={"name": "a/b"},
        lost={"start": "nobody@3"},
        token={"improve": {"level": "token"}, "cluster": {"num_learners": 1}},
        numbers={"name": 7},
    )
    found = wrong(bank, files, tmp_path / "out")
    assert found.keys() == {"typo", "other", "base", "twice", "named", "lost", "token", "numbers"}
    assert "improve.upates: unknown" in found["typo"] or "upates" in found["typo"]
    assert "rollout.num_workers: 3, but" in found["other"] and "by --set rollout.num_workers=..." in found["other"]
    assert "base: is not for a task to say" in found["base"] and "evaluation: is not for a task" in found["base"]
    assert "name: good is also that of" in found["twice"] and "is not a name" in found["named"]
    assert "'nobody@3' is not in the bank" in found["lost"]
    assert (
        "improve.level: token has no codes" in found["token"] and "cluster.num_learners: one process" in found["token"]
    )
    assert "name: expected a text, got" in found["numbers"]
    assert wrong(bank, files[:1], tmp_path / "out", "actions.updates=3") == {
        "good": "actions: is not for a task to say; leave it out"
    }
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_there_has_the_settings_that_it_was_begun_with(bank: Path, tasks: Tasks, tmp_path: Path) -> None:
    files = tasks(even={})
    task = read_tasks(bank, files, [], tmp_path / "out")
    assert [one.name for one in prepared(bank, task, tmp_path / "out", print)] == ["even"]
    assert read_tasks(bank, files, [], tmp_path / "out") == task
    found = wrong(bank, files, tmp_path / "out", "improve.updates=9")
    assert found["even"].startswith("improve.updates: 9, but") and "was begun with 3" in found["even"]


def test_a_task_may_start_from_a_member(bank: Path, tasks: Tasks, tmp_path: Path) -> None:
    world = find(bank / "world")
    banks.add(bank, "parent", world)
    (task,) = read_tasks(bank, tasks(child={"start": "parent"}), [], tmp_path / "out")
    (child,) = prepared(bank, [task], tmp_path / "out", print)
    assert child.config.actions is not None
    start = load_policy(str(child.config.actions.init)).state_dict()
    assert all(torch.equal(start[name], value) for name, value in load_policy(bank / "world").state_dict().items())


def test_the_eight_tasks_that_come_along_can_be_trained_together(bank: Path, tmp_path: Path) -> None:
    files = sorted((Path(__file__).resolve().parents[3] / "configs" / "bank").glob("*.yaml"))
    tasks = read_tasks(bank, files, [], tmp_path)
    assert [task.name for task in tasks] == [file.stem for file in files] and len(tasks) == 8
    assert len({reward_hash(task.config.task, task.config.reward) for task in tasks}) == 8
    for task in tasks:
        assert not unknown_parts(build_task(task.config.task), task.config.reward), task.name


def test_the_command_says_all_errors_and_starts_nothing(bank: Path, tasks: Tasks, tmp_path: Path) -> None:
    files = tasks(typo={"improve": {"upates": 3}}, part={"reward": {"weights": {"beauty": 1.0}}})
    words = ["bank", "train", str(bank), *map(str, files), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "300"})
    assert done.exit_code == 2 and "upates" in done.output
    done = CliRunner().invoke(app, [*words[:3], str(files[1]), *words[5:]], env={"COLUMNS": "300"})
    assert done.exit_code == 2 and "beauty" in done.output
    found, wrong_ones, _ = examine_tasks(bank, tasks(even={}, odd={}), ["rollout.num_workers=1"], tmp_path / "out")
    assert [task.name for task in found] == ["even", "odd"] and not wrong_ones
    stop = CliRunner().invoke(app, ["bank", "stop", str(tmp_path), "typo"], env={"COLUMNS": "300"})
    assert stop.exit_code == 2 and "has no policy 'typo'" in stop.output
    assert not (tmp_path / "out").exists()


# -- turns and requests ------------------------------------------------------------------------------------------------


def test_work_takes_turns_and_can_be_ended_where_it_waits() -> None:
    said: list[str] = []

    def work(name: str) -> None:
        try:
            for number in range(2):
                said.append(f"{name}{number}")
                give_way()
            said.append(f"{name} done")
        except KeyError:
            said.append(f"{name} ended")
            raise

    one, two = TakesTurns(partial(work, "a")), TakesTurns(partial(work, "b"))
    one.go_on()
    two.go_on()
    one.go_on()
    assert said == ["a0", "b0", "a1"] and not one.ended
    with pytest.raises(KeyError):
        two.abort(KeyError("x"))
    one.go_on()
    assert said[3:] == ["b ended", "a done"] and one.ended and two.ended


def test_requests_are_taken_once_and_nonsense_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "EVERY", 0.0)
    inbox.ask(tmp_path, "old", "stop")
    box = inbox.Inbox(tmp_path)
    assert box.take() == {}, "that was to an earlier start"
    inbox.ask(tmp_path, "plus", "stop")
    inbox.ask(tmp_path, "times", "start")
    (tmp_path / inbox.FOLDER / "odd.json").write_text('{"wanted": "rm"}')
    (tmp_path / inbox.FOLDER / "torn.json").write_text("{")
    assert box.take() == {"plus": "stop", "times": "start"} and box.take() == {}
