"""What a pipeline costs around the model: actions/s through sampling, transport, update and publishing, against RLlib's
stock PPO.

    python benchmarks/rllib_overhead.py [--repeats 5] [--quick] [--out DIR]

Both sides: RLlib's Algorithm on a private Ray, 2 runners with one thread, the learner in the driver with 2 threads,
6,144 actions per update (128 rollouts of 48), one pass, one optimiser step. ``PPO``: RLlib as it is, on an environment
of 64 actions and
128 numbers that answers at once, 64 copies per runner, a network of 2 x 128. ``ours, decode at once``: this project's
workers, records, verifier, shipped features, replay buffer and learner (policy of 2 blocks x 128), with a stub for
decoding, so that what
remains is everything around it. ``ours``: the same with the 0.9 M-parameter base LM decoding.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import ray
import torch
from common import alternate, arguments, ratio, report, short, spread
from models import endless
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from transformers import AutoTokenizer

from configs.schema import RunConfig
from latent_control.pretrained import base_path
from latent_control.records import Generation
from pipeline.cluster.connect import connected
from pipeline.replay.actor import ReplayActor, ReplayHandle
from pipeline.rl.accounting import Records
from pipeline.rl.config import algorithm_config
from rollout_workers.engines import DecodeJob
from rollout_workers.env_runner import LMEnvRunner
from rollout_workers.rollouts import HostSpec

WIDTH, ACTIONS, GROUP = 128, 64, 8


class InstantEnv(gym.Env):
    """Episodes of fixed length in which nothing happens."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (WIDTH,), np.float32)
        self.action_space = gym.spaces.Discrete(ACTIONS)
        self.length, self.seen = config["length"], np.zeros(WIDTH, np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Start again."""
        self.steps = 0
        return self.seen, {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Reward 1 for even actions."""
        self.steps += 1
        return self.seen, float(action % 2 == 0), self.steps >= self.length, False, {}


class InstantEngine:
    """Random codes and tokens at once, with features of the right shape."""

    level, world_hash, codebook_hash, ships_features = "latent", "", "", True

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def use(self, policy: Any) -> None:
        """Nothing is steered."""

    def generate(self, job: DecodeJob) -> Generation:
        """Every response has full length."""
        shape = (len(job.seeds), job.max_new_tokens)
        lengths = [len(prompt) + job.max_new_tokens - 1 for prompt in job.prompts for _ in range(job.repeats)]
        return Generation(
            tokens=torch.randint(4, 150, shape),
            actions=torch.randint(ACTIONS, shape),
            action_logp=torch.full(shape, -4.0),
            lengths=torch.full(shape[:1], job.max_new_tokens),
            finish_reasons=("length",) * shape[0],
            versions=torch.zeros(shape, dtype=torch.long),
            features=tuple(torch.zeros(length, WIDTH) for length in lengths),
        )


class InstantRunner(LMEnvRunner):
    """A worker that decodes at once."""

    def _load(self, spec: HostSpec) -> Any:
        return InstantEngine(AutoTokenizer.from_pretrained(base_path(spec.checkpoint), trust_remote_code=False))


def ppo(length: int, rollouts: int) -> Any:
    """RLlib's PPO with its best settings for this size."""
    return (
        PPOConfig()
        .environment(InstantEnv, env_config={"length": length})
        .env_runners(num_env_runners=2, num_envs_per_env_runner=rollouts // 2, rollout_fragment_length=length)
        .training(train_batch_size_per_learner=rollouts * length, minibatch_size=rollouts * length, num_epochs=1)
        .learners(num_learners=0)
        .rl_module(model_config=DefaultModelConfig(fcnet_hiddens=[WIDTH, WIDTH]))
        .debugging(log_level="ERROR")
        .build_algo()
    )


def latent(checkpoint: Path, config: RunConfig, runner: type[LMEnvRunner] | None, replay: Path) -> Any:
    """This project's algorithm; ``runner`` stands in for its worker class."""
    assert config.improve is not None
    host = HostSpec(level="latent", checkpoint=str(checkpoint))
    rllib = algorithm_config(
        config, host, num_actions=ACTIONS, reads="late", late_blocks=2, learning_rate=config.improve.learning_rate
    )
    algorithm = (rllib.env_runners(env_runner_cls=runner) if runner else rllib).build_algo()
    algorithm.attach(Records(replay=ReplayHandle(ray.remote(num_cpus=0)(ReplayActor).remote(str(replay), 4096, "a"))))
    return algorithm


def parts(result: dict[str, Any], actions: int) -> tuple[float, float]:
    """(seconds sampling, seconds updating) of one update."""
    if "improve" in result:
        assert result["improve"]["tokens"] == actions, "the sides must do the same number of actions"
        return float(result["improve"]["seconds_sampling"]), float(result["improve"]["seconds_updating"])
    return float(result["timers"]["env_runner_sampling_timer"]), float(result["timers"]["learner_update_timer"])


def measure(
    algorithms: dict[str, Any], updates: int, actions: int, repeats: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Actions/s per side and round, and the last update's parts."""
    last: dict[str, Any] = {}

    def side(name: str) -> Callable[[], float]:
        def round_() -> float:
            started = time.perf_counter()
            for _ in range(updates):
                result = algorithms[name].train()
            last[name] = parts(result, actions)
            return updates * actions / (time.perf_counter() - started)

        return round_

    return alternate({name: side(name) for name in algorithms}, repeats), last


def main() -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--updates", type=int, default=10, help="updates per round")
    options = parser.parse_args()
    length, rollouts = (4, 16) if options.quick else (48, 128)
    updates = 1 if options.quick else options.updates
    improve = {"prompts_per_update": rollouts // GROUP, "group_size": GROUP}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        checkpoint = endless(work)
        config = RunConfig(
            base={"model": base_path(checkpoint)}, improve=improve, rollout={"num_workers": 2, "max_new_tokens": length}
        )
        room = config.model_copy(update={"rollout": config.rollout.model_copy(update={"num_workers": 6})})
        with connected(room):  # idle runners of the other sides keep their CPUs
            torch.set_num_threads(2)
            algorithms = {
                "RLlib PPO": ppo(length, rollouts),
                "ours, decode at once": latent(checkpoint, config, InstantRunner, work / "instant"),
                "ours": latent(checkpoint, config, None, work / "ours"),
            }
            rates, last = measure(algorithms, updates, rollouts * length, options.repeats)
            for algorithm in algorithms.values():
                algorithm.stop()
    lines = [
        {
            "side": name,
            "actions/s": spread(values),
            "us per action": short(1e6 / sorted(values)[len(values) // 2]),
            "sampling / update, s": f"{last[name][0]:.3f} / {last[name][1]:.3f}",
            "side / PPO": spread(list(ratio(values, rates["RLlib PPO"]).values())),
        }
        for name, values in rates.items()
    ]
    report("rllib_overhead", lines, {"actions_per_update": rollouts * length, "actions_per_second": rates}, options.out)


if __name__ == "__main__":
    main()
