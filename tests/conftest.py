"""What several tests share: a tiny random base LM and latent-action models on it in which codes matter."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # the tests of configs and command line stay light
    from transformers import PreTrainedModel

    from latent_control import LatentActionLM

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as pipeline/__init__.py, before torch is loaded
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests are tiny, and two processes of them share the cores
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 starves workers beside the tests of another process

VOCABULARY, END, PAD = 48, 2, 0
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": END,
    "initializer_range": 0.2,
}


LONGEST = (
    *("test_run.py", "test_algorithm.py", "test_walks.py", "test_dynamic_sampling.py", "test_sampling.py"),
    *("test_damage.py", "test_bank_training.py", "test_frames.py", "test_docs_run.py", "test_audit.py"),
    *("test_texts.py", "test_learner.py", "test_cli.py"),
)
"""Files of 15 seconds and more: those with Ray workers, the longest first, then those that wait for the run that the
first of all makes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of two processes that take file after file, none is left with a long one at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def make_base() -> Callable[..., PreTrainedModel]:
    """``make_base(**changed settings)``: a new random Llama in float32, the same one each time."""

    def make(**settings: Any) -> PreTrainedModel:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return LlamaForCausalLM(LlamaConfig(**SHAPE | settings)).eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def randomise() -> Callable[[LatentActionLM], LatentActionLM]:
    """Gives a new model merge weights and heads as large as training would: codes change tokens, choices are not
    uniform."""

    def change(model: LatentActionLM, seed: int = 3) -> LatentActionLM:
        import torch

        generator = torch.Generator().manual_seed(seed)
        heads = [stack.head.weight for stack in (model.policy, model.inverse_dynamics) if stack is not None]
        for weight, std in [(w, 0.2) for w in model.merge.parameters()] + [(w, 0.4) for w in heads]:
            torch.nn.init.normal_(weight, std=std, generator=generator)
        return model

    return change


@pytest.fixture(scope="session")
def make_model(
    make_base: Callable[..., PreTrainedModel], randomise: Callable[[LatentActionLM], LatentActionLM]
) -> Callable[..., LatentActionLM]:
    """``make_model(**arguments of from_base)``: a new model with 8 codes on a new base; ``untrained=True`` leaves its
    identity start."""

    def make(*, untrained: bool = False, **arguments: Any) -> LatentActionLM:
        from latent_control import LatentActionLM

        base = arguments.pop("base", None) or make_base()
        model = LatentActionLM.from_base(base, **{"num_actions": 8, "seed": 1} | arguments).eval()
        return model if untrained else randomise(model)

    return make


@pytest.fixture
def base(make_base: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """A tiny random Llama: 4 blocks x 32, 48 tokens, end token 2, pad token 0."""
    return make_base()


@pytest.fixture(scope="module")
def model(make_model: Callable[..., LatentActionLM]) -> LatentActionLM:
    """The usual model (8 codes, both decoder stacks ``late``, 2 blocks). Shared in a file: do not change it."""
    return make_model()
