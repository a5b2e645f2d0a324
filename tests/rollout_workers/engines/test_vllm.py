"""vLLM against the built-in engine. Runs in an environment of its own (``docs/vllm.md``) and is skipped elsewhere."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from configs.schema import RolloutConfig as RolloutSettings
from latent_control import LatentActionLM
from rollout_workers.engines import DecodeJob, RolloutEngine, load_engine
from rollout_workers.engines.vllm import read_options
from rollout_workers.rollouts import HostSpec

pytest_plugins = ("rl_fixtures",)

ROOT = Path(__file__).parents[3]
needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM is not installed in this environment: docs/vllm.md"
)

JOB = DecodeJob(
    prompts=((5, 9, 14, 3), (7, 1), (6, 6, 8, 11, 4, 9, 2, 13), (3,)),
    repeats=3,
    seeds=tuple(range(100, 112)),
    max_new_tokens=24,
)


def checkpoint(folder: Path, **shape: object) -> Path:
    """64 random codes on the embedded base LM that change what is generated."""
    layers = {"policy_layers": 2, "inverse_dynamics_layers": 2, "merge_layers": 2}
    model = LatentActionLM.from_base(
        ROOT / "configs" / "models" / "countdown-1m", num_actions=64, seed=0, **layers | shape
    )
    generator = torch.Generator().manual_seed(0)
    for weight in (*model.merge.parameters(), model.codebook, model.policy.head.weight):
        torch.nn.init.normal_(weight, std=0.1, generator=generator)
    return model.save_pretrained(folder)


def engine(name: str, folder: Path, **options: object) -> RolloutEngine:
    settings = RolloutSettings(engine=name, batch_size=8, engine_options=options)
    spec = HostSpec(level="latent", checkpoint=str(folder))
    return load_engine(spec, settings, device=torch.device("cpu"), policy_dtype=torch.float32)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[RolloutEngine, RolloutEngine]:
    """The built-in one and vLLM on one checkpoint."""
    folder = checkpoint(tmp_path_factory.mktemp("vllm") / "latent")
    return engine("local", folder), engine("vllm", folder, max_model_len=64)


def assert_same(local: RolloutEngine, vllm: RolloutEngine, job: DecodeJob) -> torch.Tensor:
    """Equal codes, tokens and log-probabilities; returns the codes."""
    wanted, found = local.generate(job), vllm.generate(job)
    assert torch.equal(found.lengths, wanted.lengths) and found.finish_reasons == wanted.finish_reasons
    live = wanted.actions >= 0
    assert torch.equal(found.actions, wanted.actions) and torch.equal(found.tokens[live], wanted.tokens[live])
    assert float((found.action_logp - wanted.action_logp).abs().max()) < 1e-4
    assert torch.equal(found.versions >= 0, live)
    return wanted.actions


@needs_vllm
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}])
def test_rollouts_are_those_of_the_built_in_engine(
    engines: tuple[RolloutEngine, RolloutEngine], sampling: dict[str, float]
) -> None:
    local, vllm = engines
    assert (vllm.world_hash, vllm.codebook_hash) == (local.world_hash, local.codebook_hash)
    actions = assert_same(local, vllm, replace(JOB, **sampling))
    assert len(actions[actions >= 0].unique()) > 5, "codes differ"


@needs_vllm
def test_a_new_policy_steers_from_the_next_job_on(engines: tuple[RolloutEngine, RolloutEngine]) -> None:
    """Not only its head: the caches that its blocks have filled for prompts seen before are made anew."""
    local, vllm = engines
    before = assert_same(local, vllm, JOB)
    policy = local.host.policy
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    local.use(policy)
    vllm.use(policy)
    assert not torch.equal(assert_same(local, vllm, JOB), before)


@needs_vllm
def test_a_worker_on_vllm_trains(ray_session: None, tmp_path: Path) -> None:
    """A real actor, live updates, and a learner that finds the log-probabilities the worker recorded."""
    from rl_tools import rl_config

    from pipeline.rl.config import algorithm_config
    from pipeline.stages.improve import update_metrics

    host = HostSpec(level="latent", checkpoint=str(checkpoint(tmp_path / "latent")))
    settings = {"num_workers": 1, "engine": "vllm", "engine_options": {"max_model_len": 64}}
    config = rl_config(ROOT / "configs" / "models" / "countdown-1m", rollout=settings)
    algorithm = algorithm_config(
        config, host, num_actions=64, reads="late", late_blocks=2, learning_rate=1e-3
    ).build_algo()
    try:
        metrics = [update_metrics(algorithm.train()) for _ in range(4)]
    finally:
        algorithm.stop()
    assert max(m["logp_gap"] for m in metrics) < 1e-4
    assert all(m["rollouts"] == 16 for m in metrics)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"rollout.engine_options.cpu_cache_gb: .* engine vllm takes max_model_len"):
        read_options(RolloutSettings(engine="vllm", engine_options={"cpu_cache_gb": -1}))


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_error_names_the_page(tmp_path: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"docs/vllm\.md"):
        engine("vllm", checkpoint(tmp_path / "latent"))
