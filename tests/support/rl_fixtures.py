"""A tiny base LM with a tokenizer, a checkpoint on it, and one Ray for the session. Test modules name this in
``pytest_plugins``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rl_tools import NUM_ACTIONS, WIDTH, Config, host_of, rl_config, rllib_config

from configs.loading import dump_config
from configs.schema import Architecture, RunConfig
from latent_control import LatentActionLM
from learners.base_training import new_model, word_tokenizer
from pipeline.cluster.connect import connected
from pipeline.rl.algorithm import LatentRL
from pipeline.storage import checkpoints
from rollout_workers.tasks.countdown import Countdown


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 blocks x 32 with countdown's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    tokenizer = word_tokenizer(Countdown.words)
    shape = Architecture(hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        new_model(shape, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_base: Path, randomise: Callable[[LatentActionLM], LatentActionLM]) -> Path:
    """Eight codes that matter on ``tiny_base``; policy and inverse dynamics of one block read ``late``."""
    layers = {"inverse_dynamics_layers": 1, "merge_layers": 1, "policy_layers": 1}
    model = randomise(LatentActionLM.from_base(tiny_base, num_actions=NUM_ACTIONS, seed=1, **layers))
    # Large codes: a token depends on its code more than on its state, which is soon learned. Small choices: the policy
    # explores.
    model.codebook.data *= 8
    torch.nn.init.normal_(model.policy.head.weight, std=0.05, generator=torch.Generator().manual_seed(6))
    return model.save_pretrained(tiny_base.parent / "checkpoint")


@pytest.fixture(scope="session")
def config(tiny_base: Path) -> Config:
    """``config(improve={...}, rollout={...}, cluster={...})``: ``rl_config`` on ``tiny_base``."""
    return lambda **sections: rl_config(tiny_base, **sections)


@pytest.fixture(scope="session")
def finished_run(config: Config, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose last stage was ``clone``, with ``tiny_checkpoint`` as its result. Do not change it."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    checkpoints.write(
        folder / "checkpoints" / "clone",
        files=lambda staging: LatentActionLM.from_pretrained(tiny_checkpoint).save_pretrained(staging) and None,
        info={"stage": "clone", "metrics": {}},
    )
    (folder / "config.yaml").write_text(
        dump_config(config(actions={"num_actions": NUM_ACTIONS}, clone={}, tracking={"enabled": False}))
    )
    (folder / "summary.json").write_text(json.dumps({"stages": {}, "evaluation": {"cloned": {"greedy": 0.5}}}))
    return folder


@pytest.fixture(scope="session")
def ray_session(tiny_base: Path) -> Iterator[None]:
    """One private Ray for all tests of the session."""
    with connected(rl_config(tiny_base, rollout={"num_workers": 6})):
        yield


@pytest.fixture
def algorithm(ray_session: None, tiny_checkpoint: Path) -> Iterator[Callable[..., LatentRL]]:
    """``algorithm(config, level="latent")``: workers and learner, stopped when the test ends."""
    built: list[LatentRL] = []

    def build(config: RunConfig, level: str = "latent") -> LatentRL:
        built.append(rllib_config(config, host_of(tiny_checkpoint, level)).build_algo())
        return built[-1]

    yield build
    for one in built:
        one.stop()
