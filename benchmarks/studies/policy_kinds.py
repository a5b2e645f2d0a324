"""Which kind of latent policy: decoder blocks or an MLP on the base's final state, over rates and passes.

    python benchmarks/studies/policy_kinds.py RUN [--kinds blocks mlp] [--rates 5e-4] [--epochs 1 2] [--target-kl 0.05]
        [--min-rate-share 0.1] [--seeds 0] [--updates 150] [--clone-updates 6000 --clone-passes 12] [--width 256]
        [--out FILE]
    python benchmarks/studies/policy_kinds.py --publish FILE      one setting a kind, equal seeds: their differences

``RUN`` is a finished run whose codebook all kinds share (countdown.yaml's, say). Each kind is cloned from its inverse
dynamics model by the run's own ``clone`` settings (an MLP's number of updates and passes may be others), then trained
by the run's own ``improve`` settings with the rate, passes and bound of each row, in this process: an ``LMEnvRunner``
samples, a ``PolicyLearner`` updates. A row: mean reward of the last 20 updates, success on held-out prompts sampled,
greedy by code and greedy by token, seconds of sampling and updating.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from ray.rllib.core import DEFAULT_MODULE_ID

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import row, write

from configs.loading import load_config
from configs.schema import RunConfig
from latent_control.model import LatentActionLM
from latent_control.policies.latent import latent_policy
from latent_control.pretrained import array_hash, read_shape
from pipeline.rl.config import algorithm_config
from pipeline.rl.heldout import heldout_requests
from pipeline.rl.prompt_order import prompt_indices
from pipeline.stages.offline_job import OfflineJob
from pipeline.stages.offline_work import work
from rollout_workers.env_runner import LMEnvRunner
from rollout_workers.rollouts import HostSpec, PolicyVersion, RolloutRequest


def cloned(run: Path, config: RunConfig, kind: str, shape: dict[str, Any], folder: Path) -> Path:
    """The checkpoint of ``kind`` after cloning, made once."""
    result = folder / kind / "checkpoints" / "clone"
    if result.is_dir():
        return result
    model = LatentActionLM.from_pretrained(run / "checkpoints" / "actions")
    model.config = dataclasses.replace(model.config, policy_kind=kind, **shape)
    torch.manual_seed(config.seed)
    model.policy = latent_policy(model.base.decoder, model.config)
    if kind == "blocks":
        model.policy.start_from(model.base.decoder)
    start = model.save_pretrained(folder / kind / "start")
    assert config.clone is not None
    job = OfflineJob(
        stage="clone",
        config=config,
        settings=config.clone,
        source=str(start),
        base=config.base.model,
        checkpoints=str(folder / kind / "checkpoints"),
    )
    started, losses = time.perf_counter(), []
    work(job, lambda update, metrics: losses.append((update, metrics)))
    kept = {name: round(value, 4) for name, value in losses[-1][1].items()}
    print(f"{kind} cloned in {time.perf_counter() - started:.0f} s: {json.dumps(kept)}", flush=True)
    return result


def trained(config: RunConfig, checkpoint: Path, seed: int) -> dict[str, Any]:
    """One row of the table."""
    improve, shape = config.improve, read_shape(checkpoint)
    assert improve is not None
    host = HostSpec(level="latent", checkpoint=str(checkpoint), dtype=config.base.dtype)
    rllib = algorithm_config(
        config,
        host,
        num_actions=shape.num_actions,
        reads=shape.policy_state,
        late_blocks=shape.policy_layers,
        learning_rate=improve.learning_rate,
        span=shape.span,
    )
    runner = LMEnvRunner(config=rllib, worker_index=0)
    learner = rllib.build_learner(spaces={DEFAULT_MODULE_ID: (rllib.observation_space, rllib.action_space)})
    rewards, sampling, updating, size = [], 0.0, 0.0, len(runner.task.prompts("train"))
    for update in range(improve.updates):
        indices = prompt_indices(update, improve.prompts_per_update, size=size, seed=seed)
        request = RolloutRequest(
            request_id=update,
            split="train",
            prompt_indices=indices,
            seeds=(1000 * seed + update,) * len(indices),
            group_size=improve.group_size,
            policy=policy_of(learner, update),
            temperature=config.rollout.temperature,
            top_k=config.rollout.top_k,
            ship_features=True,
        )
        started = time.perf_counter()
        rollouts = runner.sample(request=request)
        sampled = time.perf_counter()
        learner.update(
            episodes=rollouts,
            num_epochs=improve.epochs,
            minibatch_size=-(-len(rollouts) // improve.minibatches),
            num_total_minibatches=improve.epochs * improve.minibatches,
            shuffle_batch_per_epoch=improve.minibatches > 1,
        )
        sampling, updating = sampling + sampled - started, updating + time.perf_counter() - sampled
        rewards.append(mean(r.reward or 0.0 for r in rollouts))
    row: dict[str, Any] = {
        "last_20": mean(rewards[-20:]),
        "rewards": [round(reward, 4) for reward in rewards],
        "seconds_sampling": sampling,
        "seconds_updating": updating,
        "version_bytes": sum(array.nbytes for array in learner.module[DEFAULT_MODULE_ID].get_state().values()),
    }
    return row | {name: heldout(config, runner, learner, *how) for name, how in HELDOUT.items()}


HELDOUT = {"sampled": (1.0, "code"), "greedy_code": (0.0, "code"), "greedy_token": (0.0, "token")}


def policy_of(learner: Any, version: int) -> PolicyVersion:
    """What the learner holds now, as a version."""
    weights = learner.module[DEFAULT_MODULE_ID].get_state(inference_only=True)
    return PolicyVersion(version=version, weights_hash=array_hash(weights), weights=weights)


def heldout(config: RunConfig, runner: LMEnvRunner, learner: Any, temperature: float, decode: Any) -> float:
    """Success on held-out prompts."""
    prompts = config.evaluation.prompts
    (request,) = heldout_requests(config, prompts, 1, samples=1, temperature=temperature, decode=decode)
    request = dataclasses.replace(request, policy=policy_of(learner, 10**6))
    return mean(float(r.success) for r in runner.sample(request=request))


def publish(found: Sequence[dict[str, Any]]) -> None:
    """Both kinds and their paired differences, with intervals over seeds."""
    kinds = {kind: {row["seed"]: row for row in found if row["kind"] == kind} for kind in ("blocks", "mlp")}
    seeds = sorted(kinds["mlp"])
    if seeds != sorted(kinds["blocks"]) or len(found) != 2 * len(seeds):
        raise SystemExit("of each kind one row a seed is needed, of equal seeds")
    rows = []
    for measure in ("last_20", *HELDOUT):
        blocks, mlp = ([kinds[kind][seed][measure] for seed in seeds] for kind in kinds)
        rows += [row(f"blocks: {measure}", blocks), row(f"mlp: {measure}", mlp)]
        rows.append(row(f"mlp - blocks: {measure}", [m - b for m, b in zip(mlp, blocks, strict=True)]))
    write("policy_kinds", "benchmarks/studies/policy_kinds.py", seeds, rows, runs=found)


def main(arguments: Sequence[str] | None = None) -> None:
    """The grid, row by row; each is written when it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--publish", type=Path, help="rows of blocks and mlp, to docs/results/policy_kinds.json")
    parser.add_argument("--min-rate-share", type=float, default=1.0, help="a cosine to this share of the rate")
    parser.add_argument("--kinds", nargs="+", default=["blocks", "mlp"])
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-4])
    parser.add_argument("--epochs", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--target-kl", nargs="+", type=float, default=[0.0], help="0: none")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--updates", type=int)
    parser.add_argument("--clone-updates", type=int)
    parser.add_argument("--clone-passes", type=int, default=1)
    parser.add_argument("--width", type=int)
    parser.add_argument("--trains", default="all")
    parser.add_argument("--work", type=Path, default=Path("runs/policy_kinds"), help="folder of the clones")
    parser.add_argument("--out", type=Path, default=Path("docs/results/policy_kinds.jsonl"))
    asked = parser.parse_args(arguments)
    if asked.publish is not None:
        publish([json.loads(line) for line in asked.publish.read_text().splitlines()])
        return
    torch.set_num_threads(1)
    config = load_config(asked.run / "config.yaml")
    for kind in asked.kinds:
        own = {} if asked.clone_updates is None or kind == "blocks" else {"updates": asked.clone_updates}
        own |= {} if kind == "blocks" else {"passes": asked.clone_passes}
        assert config.clone is not None and config.improve is not None
        now = config.model_copy(update={"clone": config.clone.model_copy(update=own)})
        shape = {"policy_reads": None} | ({"policy_width": asked.width} if kind == "mlp" else {})
        checkpoint = cloned(asked.run, now, kind, shape, asked.work)
        for rate, epochs, bound, seed in itertools.product(asked.rates, asked.epochs, asked.target_kl, asked.seeds):
            settings = {"learning_rate": rate, "epochs": epochs, "target_kl": bound or None, "trains": asked.trains}
            settings |= {"updates": asked.updates} if asked.updates is not None else {}
            settings |= {"min_learning_rate_share": asked.min_rate_share}
            this = now.model_copy(update={"improve": config.improve.model_copy(update=settings), "seed": config.seed})
            row = {"kind": kind, "seed": seed, **settings, **trained(this, checkpoint, seed)}
            with asked.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps({name: value for name, value in row.items() if name != "rewards"}), flush=True)


if __name__ == "__main__":
    main()
