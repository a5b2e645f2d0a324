"""One RL update: the latent policy on cached features against a full token-level update; and features shipped or
recomputed.

    python benchmarks/update.py [--models tiny smollm2] [--repeats 5] [--quick] [--out DIR]

Same rollouts (sampled by a rollout worker in this process, random rewards), same GRPO advantages, same clipped loss,
same padded microbatches, AdamW, gradient clipping, threads (2) and precision (float32 tiny, bfloat16 autocast SmolLM2).
``latent``: ``PolicyLearner.update``, everything RLlib does around it included. ``token-level``: plain torch over all
parameters of the base LM, language head at response positions only. ``recompute``: the learner runs the base once per
rollout itself.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from common import alternate, arguments, ratio, report, spread
from models import DTYPE, POLICY_BLOCKS, base_folder, latent_model
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns

from configs.schema import RunConfig
from latent_control.algorithms import ALGORITHMS
from latent_control.algorithms.common import Outcomes
from latent_control.base_lm import load_base
from latent_control.losses import clipped_surrogate
from learners.collate import Places, collate, group_size
from learners.learner import PolicyLearner, microbatches, position_weights
from pipeline.rl.config import algorithm_config
from rollout_workers.env_runner import LMEnvRunner
from rollout_workers.rollouts import HostSpec, Rollout, RolloutRequest

CLIP = 0.2


def run_config(name: str, features: str, new_tokens: int) -> RunConfig:
    """Settings of an update."""
    precision = "bf16" if DTYPE[name] == "bfloat16" else "no"
    improve = {"features": features, "mixed_precision": precision, "learning_rate": 1e-5}
    return RunConfig(
        base={"model": str(base_folder(name))},
        improve=improve,
        rollout={"max_new_tokens": new_tokens, "torch_threads": 2},
    )


def rllib_config(config: RunConfig, checkpoint: Path, name: str) -> Any:
    """RLlib's config of the policy in ``checkpoint``."""
    host = HostSpec(level="latent", checkpoint=str(checkpoint), dtype=DTYPE[name])
    return algorithm_config(
        config, host, num_actions=64, reads="late", late_blocks=POLICY_BLOCKS[name], learning_rate=1e-5
    )


def make_learner(config: RunConfig, checkpoint: Path, name: str) -> PolicyLearner:
    """A learner in this process."""
    rllib = rllib_config(config, checkpoint, name)
    return rllib.build_learner(spaces={DEFAULT_MODULE_ID: (rllib.observation_space, rllib.action_space)})


def sample(config: RunConfig, checkpoint: Path, name: str, prompts: int) -> list[Rollout]:
    """Groups of 8 with features and random rewards."""
    runner = LMEnvRunner(config=rllib_config(config, checkpoint, name), worker_index=0)
    asked = {"prompt_indices": tuple(range(prompts)), "seeds": (1,) * prompts, "group_size": 8}
    request = RolloutRequest(request_id=0, split="train", ship_features=True, **asked)
    rewards = np.random.default_rng(0).random(prompts * 8)
    return [replace(r, reward=float(x)) for r, x in zip(runner.sample(request=request), rewards, strict=True)]


def latent_update(learner: PolicyLearner, rollouts: Sequence[Rollout]) -> float:
    """Seconds of one update."""
    started = time.perf_counter()
    learner.update(
        episodes=list(rollouts),
        num_epochs=1,
        minibatch_size=len(rollouts),
        num_total_minibatches=1,
        shuffle_batch_per_epoch=False,
    )
    return time.perf_counter() - started


def grpo_advantages(rollouts: Sequence[Rollout], mask: torch.Tensor) -> torch.Tensor:
    """[B, T], as the learner's own."""
    places = Places(mask)
    rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float64)
    valid, size = torch.ones(len(rollouts), dtype=torch.bool), group_size(rollouts)
    outcomes = Outcomes(rewards=rewards, valid=valid, group_size=size, taken=places.taken)
    return places.spread(ALGORITHMS["grpo"].estimate(outcomes).advantages)


def token_level(name: str, rollouts: Sequence[Rollout], most_tokens: int) -> Callable[[], float]:
    """A full token-level update in plain torch."""
    lm = load_base(base_folder(name), dtype=torch.float32).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-6)
    plain = [replace(r, features=None, actions=r.tokens) for r in rollouts]

    def update() -> float:
        started = time.perf_counter()
        batch = collate(plain)
        batch[Columns.ADVANTAGES] = grpo_advantages(plain, batch[Columns.LOSS_MASK])
        batch["weights"] = position_weights(batch[Columns.LOSS_MASK], "token")
        optimizer.zero_grad(set_to_none=True)
        for rows in microbatches(batch["lengths"], most_tokens):
            longest = int(batch["lengths"][rows].max())
            part = {key: c[rows][:, :longest] if c.ndim > 1 else c[rows] for key, c in batch.items()}
            mask = part[Columns.LOSS_MASK]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=DTYPE[name] == "bfloat16"):
                hidden = lm.get_decoder()(input_ids=part["tokens"], use_cache=False).last_hidden_state[mask]
                logits = lm.get_output_embeddings()(hidden)
            loss, _ = clipped_surrogate(
                torch.log_softmax(logits.float(), -1),
                actions=part[Columns.ACTIONS][mask],
                action_logp=part[Columns.ACTION_LOGP][mask],
                advantages=part[Columns.ADVANTAGES][mask],
                weights=part["weights"][mask],
                clip_low=CLIP,
                clip_high=CLIP,
            )
            loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        return time.perf_counter() - started

    return update


def through_object_store(rollouts: list[Rollout]) -> float:
    """Seconds to put the rollouts, features included, into Ray's object store and get them back."""
    started = time.perf_counter()
    ray.get(ray.put(rollouts))
    return time.perf_counter() - started


def measure(
    name: str, folder: Path, *, repeats: int, prompts: int, new_tokens: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds per side and round; sizes."""
    checkpoint = latent_model(name).save_pretrained(folder / name)
    config = run_config(name, "ship", new_tokens)
    rollouts = sample(config, checkpoint, name, prompts)
    bare = [replace(r, features=None) for r in rollouts]
    shipping, recomputing = (
        make_learner(run_config(name, way, new_tokens), checkpoint, name) for way in ("ship", "recompute")
    )
    assert config.improve is not None
    full = token_level(name, rollouts, config.improve.microbatch_tokens)
    torch.set_num_threads(2)
    sides = {
        "latent": lambda: latent_update(shipping, rollouts),
        "token-level": full,
        "recompute": lambda: latent_update(recomputing, bare),
        "put and get": lambda: through_object_store(rollouts),
        "put and get, bare": lambda: through_object_store(bare),
    }
    sizes = {
        "rollouts": len(rollouts),
        "tokens": sum(map(len, rollouts)),
        "positions": sum(len(r.prompt_tokens) + len(r) - 1 for r in rollouts),
        "feature_bytes": sum(r.features.nbytes for r in rollouts if r.features is not None),
    }
    return alternate(sides, repeats), sizes


def main() -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["tiny", "smollm2"], choices=["tiny", "smollm2"])
    options = parser.parse_args()
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    lines, raw = [], {}
    for name in options.models:
        prompts, new_tokens = (2, 6) if options.quick else (16, 16) if name == "tiny" else (4, 24)
        with tempfile.TemporaryDirectory() as folder:
            seconds, sizes = measure(
                name, Path(folder), repeats=options.repeats, prompts=prompts, new_tokens=new_tokens
            )
        raw[name] = {"seconds": seconds, **sizes}
        for side, values in seconds.items():
            lines.append(
                {
                    "model": f"{name}, {sizes['rollouts']} rollouts, {sizes['positions']} positions",
                    "side": side,
                    "seconds": spread(values),
                    "side / token-level": spread(list(ratio(values, seconds["token-level"]).values()))
                    if "put" not in side
                    else "",
                }
            )
    ray.shutdown()
    report("update", lines, {"measured": raw}, options.out)


if __name__ == "__main__":
    main()
