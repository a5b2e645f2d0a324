"""Many policies trained at once: task files, fair shares, and the same weights as alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
import yaml
from rl_tools import NUM_ACTIONS

from configs.loading import dump_config
from latent_control import LatentActionLM
from pipeline.bank.tasks import read_tasks
from pipeline.bank.train import Trainee, train
from pipeline.serving import bank as banks
from pipeline.serving.export import find
from pipeline.storage import checkpoints

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
    import shutil

    return Path(shutil.copytree(first_bank, tmp_path / "bank"))


SMALL: dict[str, Any] = {
    "reward": {"weights": {"length": 1.0}},
    "improve": {"updates": 3, "prompts_per_update": 4, "group_size": 4, "learning_rate": 0.01},
    "rollout": {"num_workers": 2, "max_new_tokens": 6},
    "cluster": {"learner_threads": 1},
    "tracking": {"enabled": False},
}


@pytest.fixture
def tasks(tmp_path: Path) -> Tasks:
    """``tasks(short={"improve": {"updates": 2}})``: a file ``short.yaml`` with these changes of ``SMALL``."""

    def write(**changes: dict[str, Any]) -> list[Path]:
        files = []
        for name, sections in changes.items():
            data = {key: value for key, value in SMALL.items()}
            for key, value in sections.items():
                data[key] = {**data.get(key, {}), **value} if isinstance(value, dict) else value
            files.append(tmp_path / f"{name}.yaml")
            files[-1].write_text(yaml.safe_dump(data))
        return files

    return write


def trained(bank: Path, files: list[Path], out: Path) -> tuple[dict[str, Trainee], list[str]]:
    said: list[str] = []
    ended = train(bank, read_tasks(bank, files, [], out), out, say=lambda text, kind="", **facts: said.append(text))
    return {one.name: one for one in ended}, said


def test_policies_trained_together(bank: Path, tasks: Tasks, tmp_path: Path) -> None:
    ended, said = trained(bank, tasks(short={}, long={"improve": {"updates": 2}, "seed": 1}), tmp_path / "out")
    print(said)
    assert {name: (one.state, one.reason) for name, one in ended.items()} == {
        "short": ("finished", ""),
        "long": ("finished", ""),
    }
    assert banks.read_index(bank).hashes().keys() == {"short@1", "long@1"}
