"""What a stateless policy and shared prefixes save: an ``mlp`` policy against ``blocks``, a prefix tree against none.

    python benchmarks/small_policy.py [--models tiny smollm2] [--repeats 5] [--quick] [--out DIR]

Sides alternate within a round; same base, codes, prompts, rollouts, lengths, one thread, float32. ``decode``: tokens/s
of single prompts at mixed lengths (geometric, 4 to 48), sampled. ``update``: ``PolicyLearner.update`` on the same
number of shipped rollouts, two passes, whole; then its forward, backward and step alone. ``version``: bytes that are
published. ``step``: one RL step (32 rollouts of up to 8 tokens in groups of 8 on two-shot prompts, sampled and
updated), today's way (``blocks``, no tree) against ``mlp`` with a tree that has seen the shots. ``calls``, ``turns``:
prompt tokens computed over three calls on the same prompts and over four turns, divided by those that are new.
``turn 8 / turn 2``: seconds at equal new tokens.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import alternate, arguments, ratio, report, short, spread
from decode import wanted_lengths
from models import POLICY_BLOCKS, base_folder
from ray.rllib.core import DEFAULT_MODULE_ID

from configs.schema import RunConfig
from latent_control import LatentActionLM
from latent_control.decoding.generate import generate
from latent_control.decoding.prefix_tree import PrefixTree
from latent_control.decoding.sampling_params import SamplingParams
from latent_control.pretrained import read_shape
from latent_control.text import left_padded
from learners.learner import PolicyLearner
from pipeline.rl.config import algorithm_config
from rollout_workers.env_runner import LMEnvRunner
from rollout_workers.rollouts import HostSpec, Rollout, RolloutRequest

Sides = dict[str, Callable[[], float]]


def checkpoint(name: str, kind: str, folder: Path) -> Path:
    """64 random codes on the base; speed does not depend on training."""
    blocks = POLICY_BLOCKS[name]
    shape: dict[str, Any] = {"inverse_dynamics_layers": blocks, "merge_layers": 2, "policy_kind": kind}
    shape |= {"policy_layers": blocks} if kind == "blocks" else {}
    model = LatentActionLM.from_base(base_folder(name), num_actions=64, seed=0, dtype="float32", **shape)
    return model.save_pretrained(folder / f"{name}-{kind}")


def worker_and_learner(name: str, folder: Path, tokens: int, tree: int) -> tuple[LMEnvRunner, PolicyLearner]:
    """Both in this process."""
    config = RunConfig(
        base={"model": str(base_folder(name))},
        improve={"learning_rate": 1e-5, "epochs": 2},
        rollout={"max_new_tokens": tokens, "prefix_cache_mb": tree},
    )
    shape = read_shape(folder)
    rllib = algorithm_config(
        config,
        HostSpec(level="latent", checkpoint=str(folder), dtype="float32"),
        num_actions=64,
        reads=shape.policy_state,
        late_blocks=shape.late_blocks,
        learning_rate=1e-5,
    )
    learner = rllib.build_learner(spaces={DEFAULT_MODULE_ID: (rllib.observation_space, rllib.action_space)})
    return LMEnvRunner(config=rllib, worker_index=0), learner


def rewarded(rollouts: list[Rollout]) -> list[Rollout]:
    """The same with random rewards."""
    rewards = np.random.default_rng(0).random(len(rollouts))
    return [replace(r, reward=float(x)) for r, x in zip(rollouts, rewards, strict=True)]


def updated(learner: PolicyLearner, rollouts: list[Rollout], *, steps_only: bool = False) -> float:
    """Seconds of an update of two passes; ``steps_only``: of forward, backward and step alone."""
    inside, step = 0.0, type(learner)._update

    def timed(batch: Any, **arguments: Any) -> Any:
        nonlocal inside
        began = time.perf_counter()
        found = step(learner, batch, **arguments)
        inside += time.perf_counter() - began
        return found

    learner._update = timed  # type: ignore[method-assign]
    started = time.perf_counter()
    learner.update(
        episodes=rollouts,
        num_epochs=2,
        minibatch_size=len(rollouts),
        num_total_minibatches=2,
        shuffle_batch_per_epoch=False,
    )
    return inside if steps_only else time.perf_counter() - started


def decode_sides(models: dict[str, LatentActionLM], rows: int) -> Sides:
    """Tokens/s."""
    lengths = wanted_lengths(rows, True, 48)
    prompts = torch.randint(5, 100, (rows, 24), generator=torch.Generator().manual_seed(0))

    def run(model: LatentActionLM) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(prompts, max_new_tokens=lengths, batch_size=rows // 4, seed=0, stop_token=-1)
        return sum(lengths) / (time.perf_counter() - started)

    return {kind: lambda model=model: run(model) for kind, model in models.items()}


def step_sides(name: str, folders: dict[str, Path], shots: list[int], prompts: int) -> Sides:
    """Seconds of one RL step on prompts behind the same shots."""

    def side(kind: str, tree: int) -> Callable[[], float]:
        runner, learner = worker_and_learner(name, folders[kind], 8, tree)
        numbers = iter(range(10**6))
        engine = runner.engine
        generated = engine.generate  # type: ignore[union-attr]

        def with_shots(job: Any) -> Any:
            return generated(replace(job, prompts=tuple((*shots, *prompt) for prompt in job.prompts)))

        engine.generate = with_shots  # type: ignore[union-attr,method-assign]

        def step() -> float:
            started = time.perf_counter()
            first = next(numbers) * prompts
            request = RolloutRequest(
                request_id=0,
                split="train",
                prompt_indices=tuple(range(first, first + prompts)),
                seeds=(1,) * prompts,
                group_size=8,
                ship_features=True,
            )
            rollouts = rewarded(runner.sample(request=request))
            if kind == "blocks":  # their features cover the shots, too
                rollouts = [replace(r, prompt_tokens=np.array([*shots, *r.prompt_tokens], np.int32)) for r in rollouts]
            updated(learner, rollouts)
            return time.perf_counter() - started

        return step

    return {"blocks, no tree": side("blocks", 0), "mlp, tree": side("mlp", 512)}


def calls_and_turns(model: LatentActionLM) -> dict[str, float]:
    """Computed prompt tokens divided by needed ones; seconds of turn 8 over those of turn 2."""
    dice = np.random.default_rng(0)

    def words(count: int) -> list[int]:
        return dice.integers(5, 100, count).tolist()

    def decode(rows: list[list[int]], tree: PrefixTree, seed: int) -> torch.Tensor:
        params = SamplingParams(max_new_tokens=12, seed=seed, stop_token=-1, keep_responses=True)
        with torch.inference_mode():
            return generate(
                model.base, model.actor(), params, *left_padded(rows, torch.device("cpu")), tree=tree
            ).tokens

    tree, rows = PrefixTree(512), [words(40) for _ in range(8)]
    for call in range(3):
        decode(rows, tree, call)
    found, tree, needed, seconds = {"calls": tree.computed / (8 * 40)}, PrefixTree(512), 8 * 40, []
    computed_after_four = 0.0
    for turn in range(8):
        started = time.perf_counter()
        tokens = decode(rows, tree, turn)
        seconds.append(time.perf_counter() - started)
        if turn < 4:
            computed_after_four = tree.computed / needed
        rows = [[*row, *said, *words(20)] for row, said in zip(rows, tokens.tolist(), strict=True)]
        needed += 8 * 21
    return found | {"turns": computed_after_four, "turn 8 / turn 2": seconds[7] / seconds[1]}


def main() -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["tiny", "smollm2"], choices=["tiny", "smollm2"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines: list[dict[str, Any]] = []
    for name in options.models:
        small = options.quick or name == "smollm2"
        with tempfile.TemporaryDirectory() as temporary:
            folders = {kind: checkpoint(name, kind, Path(temporary)) for kind in ("blocks", "mlp")}
            models = {kind: LatentActionLM.from_pretrained(folder) for kind, folder in folders.items()}
            add(lines, name, "decode, tokens/s", decode_sides(models, 16 if small else 128), options.repeats)
            learners: Sides = {}
            steps: Sides = {}
            for kind, folder in folders.items():
                runner, learner = worker_and_learner(name, folder, 8 if small else 16, 0)
                count = 4 if small else 16
                request = RolloutRequest(
                    request_id=0,
                    split="train",
                    prompt_indices=tuple(range(count)),
                    seeds=(1,) * count,
                    group_size=8,
                    ship_features=True,
                )
                rollouts = rewarded(runner.sample(request=request))
                learners[kind] = partial(updated, learner, rollouts)
                steps[kind] = partial(updated, learner, rollouts, steps_only=True)
            add(lines, name, "update, seconds", learners, options.repeats)
            add(lines, name, "forward, backward, step, seconds", steps, options.repeats)
            shots = np.random.default_rng(1).integers(5, 100, 160).tolist()
            add(lines, name, "step, seconds", step_sides(name, folders, shots, 4), options.repeats)
            sizes = {kind: model.parameter_counts() for kind, model in models.items()}
            for kind, size in sizes.items():
                share = size["policy"] / size["base"]
                lines.append(row(name, f"version, {kind}", f"{4 * size['policy']:,} B", f"{share:.4f} of the base"))
            for what, value in calls_and_turns(models["mlp"]).items():
                lines.append(row(name, what, "", short(value)))
    report("small_policy", lines, {}, options.out)


def row(model: str, what: str, sides: str, found: str) -> dict[str, Any]:
    """A line of the table."""
    return {"model": model, "what": what, "sides": sides, "found": found}


def add(lines: list[dict[str, Any]], model: str, what: str, sides: Sides, repeats: int) -> None:
    """Measure two sides; the second's measure over the first's."""
    measured = alternate(sides, repeats)
    first, second = measured
    shares = ratio(measured[second], measured[first])
    cells = ", ".join(f"{side} {spread(values)}" for side, values in measured.items())
    found = f"{second} / {first}: {short(shares['median'])} ({short(shares['min'])} - {short(shares['max'])})"
    lines.append(row(model, what, cells, found))
    print(f"{model}: {what}: {found}; medians {[short(statistics.median(v)) for v in measured.values()]}", flush=True)


if __name__ == "__main__":
    main()
