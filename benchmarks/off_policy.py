"""Off-policy estimates against the online truth on countdown: how often do their 95 % intervals cover it?

    python benchmarks/off_policy.py --runs RUN_DIR ...        finished countdown runs (their clone stage is the start)

Each run starts reinforcement learning from its cloned policy twice, with other prompts each time. Every policy on the
way also plays prompts that are not trained on ("traffic": what a policy in service would leave behind). A repeat is a
window of 10 updates: 160 prompts x 8 rollouts, a mixture of 10 policy versions, seen from policies that were not
trained on them:

- next: the policy after the window's last update; later: that of 5 updates further on; far: of 25.
- offline: the window's first policy, improved offline (awr) on half of the window's prompts and judged by the other
  half.

and from policies that were trained on the rollouts they are judged by, which must be expected to fail:

- next, own rollouts: judged by the rollouts of the window's updates instead of the traffic.
- offline, own rollouts: judged by the half of the prompts it was improved on.

The truth is the mean reward of new rollouts of the policy for the same prompts, 40 each (its standard error, about
0.005, counts against the estimators). One process, no Ray.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, report
from ray.rllib.core import DEFAULT_MODULE_ID

from configs.loading import load_config
from configs.schema import DataSource, ImproveOffline, RunConfig
from latent_control.distributions import rollout_seed
from latent_control.model import LatentActionLM
from latent_control.off_policy import ESTIMATORS, RECOMMENDED, off_policy_report
from latent_control.pretrained import array_hash, world_hash
from learners.improve_offline import ImproveOfflineStage
from learners.learner import PolicyLearner
from learners.offline_training import Hooks, make_optimizer, train
from pipeline.replay.dataset import StoredRollouts, logged, read_rollouts, rollout_batches
from pipeline.replay.writer import ReplayWriter
from pipeline.rl.config import algorithm_config
from rollout_workers.env_runner import LMEnvRunner
from rollout_workers.rollouts import HostSpec, PolicyVersion, Rollout, RolloutRequest

Weights = dict[str, np.ndarray]
WINDOW = 10
KINDS = ("next", "later", "offline", "far", "next, own rollouts", "offline, own rollouts")
AHEAD = {"next": 0, "later": 5, "far": 25, "next, own rollouts": 0}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A run's cloned policy with a worker and a learner in this process."""

    config: RunConfig
    checkpoint: Path
    runner: LMEnvRunner
    learner: PolicyLearner

    @classmethod
    def of(cls, run_dir: Path, seed: int) -> Bench:
        """From a finished run; ``seed`` also picks the prompts."""
        config = load_config(run_dir / "config.yaml", [f"seed={seed}", "rollout.batch_size=512"], check_paths=False)
        checkpoint, shape = run_dir / "checkpoints" / "clone", config.actions
        assert shape is not None and config.improve is not None
        rllib = algorithm_config(
            config,
            HostSpec(level="latent", checkpoint=str(checkpoint)),
            num_actions=shape.num_actions,
            reads=shape.policy_reads,
            late_blocks=shape.policy_layers,
            learning_rate=config.improve.learning_rate,
        )
        spaces = {DEFAULT_MODULE_ID: (rllib.observation_space, rllib.action_space)}
        return cls(
            config=config,
            checkpoint=checkpoint,
            runner=LMEnvRunner(config=rllib, worker_index=0),
            learner=rllib.build_learner(spaces=spaces),
        )

    def weights(self) -> Weights:
        """The learner's policy."""
        return self.learner.module[DEFAULT_MODULE_ID].get_state()

    def play(
        self, weights: Weights, prompts: list[int], group: int, seed: int, *, version: int = 0, split: Any = "train"
    ) -> list[Rollout]:
        """``group`` new rollouts of each prompt."""
        policy = PolicyVersion(version=version, weights_hash=array_hash(weights), weights=weights)
        request = RolloutRequest(
            request_id=prompts[0],
            split=split,
            prompt_indices=tuple(prompts),
            seeds=(seed,) * len(prompts),
            group_size=group,
            policy=policy,
            ship_features=True,
        )
        return self.runner.sample(request=request)

    def improve(self, updates: int, folder: Path, seed: int) -> list[Weights]:
        """Reinforcement learning that leaves its rollouts in ``folder``/own and others in ``folder``/traffic.

        Returns the policy before each update, and the last.
        """
        improve, policies = self.config.improve, [self.weights()]
        assert improve is not None
        own, traffic = (ReplayWriter(folder / name / "replay", 4096, name) for name in ("own", "traffic"))
        prompts = (
            np.random.default_rng(seed)
            .choice(900_000, (updates, 2, improve.prompts_per_update), replace=False)
            .tolist()
        )
        for update in range(updates):
            streams = [rollout_seed(seed, update, place) >> 1 for place in range(2)]
            rollouts = self.play(policies[-1], prompts[update][0], improve.group_size, streams[0], version=update)
            own.add(rollouts)
            traffic.add(self.play(policies[-1], prompts[update][1], improve.group_size, streams[1], version=update))
            self.learner.update(
                episodes=rollouts,
                num_epochs=1,
                minibatch_size=len(rollouts),
                num_total_minibatches=1,
                shuffle_batch_per_epoch=False,
            )
            policies.append(self.weights())
        own.close()
        traffic.close()
        return policies

    def model(self, weights: Weights) -> LatentActionLM:
        """The checkpoint with another policy."""
        model = LatentActionLM.from_pretrained(self.checkpoint)
        model.policy.load_state_dict(
            {name: torch.from_numpy(array.copy()) for name, array in weights.items()}, strict=False
        )
        return model


def improve_offline(model: LatentActionLM, rollouts: StoredRollouts, settings: ImproveOffline, seed: int) -> Weights:
    """The policy that the offline stage makes of ``model``'s, without the pipeline around it."""
    from accelerate import Accelerator

    stage = ImproveOfflineStage(model, settings)
    hooks = Hooks(log=lambda *_: None, evaluate=lambda _: {}, save=lambda _: None)
    train(
        stage,
        rollout_batches(rollouts, settings, seed=seed),
        settings=settings,
        accelerator=Accelerator(cpu=True),
        optimizer=make_optimizer(stage, settings),
        seed=seed,
        start=0,
        hooks=hooks,
    )
    trained = {id(p) for p in model.policy.trainable()}
    return {name: p.detach().numpy().copy() for name, p in model.policy.named_parameters() if id(p) in trained}


def truth(bench: Bench, weights: Weights, rollouts: StoredRollouts, group: int, seed: int) -> float:
    """Mean reward of new rollouts for the prompts of ``rollouts``; each prompt counts as often as it does there."""
    prompts = [int(name.rsplit("/", 1)[1]) for name in rollouts.prompt_ids]
    played = bench.play(weights, prompts, group, seed)
    rewards = np.array([r.reward for r in played], float).reshape(len(prompts), group).mean(1)
    return float(np.average(rewards, weights=np.bincount(rollouts.prompts)))


def repeats(
    bench: Bench, folder: Path, windows: int, group: int, seed: int, offline_updates: int
) -> list[dict[str, Any]]:
    """All kinds of policies judged by each window of one run of reinforcement learning."""
    policies = bench.improve(windows * WINDOW + max(AHEAD.values()), folder, seed)
    world = world_hash(LatentActionLM.from_pretrained(bench.checkpoint))
    once = 10**6
    settings = ImproveOffline(
        updates=offline_updates,
        batch_size=64,
        temperature=0.3,
        learning_rate=3e-4,
        heldout_share=0.5,
        evaluate_every=once,
        checkpoint_every=once,
    )
    found = []
    for window in range(windows):
        first, last = window * WINDOW, (window + 1) * WINDOW - 1
        own, traffic = (
            read_rollouts([DataSource(kind="replay", path=str(folder / name))], world=world, versions=(first, last))
            for name in ("own", "traffic")
        )
        training, held = traffic.split(settings.heldout_share)
        offline = improve_offline(bench.model(policies[first]), training, settings, seed)
        for number, kind in enumerate(KINDS):
            weights = offline if kind.startswith("offline") else policies[last + 1 + AHEAD[kind]]
            judged = {"offline": held, "offline, own rollouts": training, "next, own rollouts": own}.get(kind, traffic)
            estimated = off_policy_report(logged(bench.model(weights), judged, bench.config.rollout))
            online = truth(bench, weights, judged, group, rollout_seed(seed, window, number) >> 1)
            found.append({"kind": kind, "seed": seed, "window": [first, last], "truth": online} | measured(estimated))
    return found


def measured(estimated: Any) -> dict[str, Any]:
    """The numbers of a report that are kept."""
    return {
        "behaviour": estimated.behaviour.value,
        "rollouts": estimated.rollouts,
        "effective": estimated.effective,
        "doubts": estimated.doubts,
        "estimates": {name: [e.value, e.low, e.high] for name, e in estimated.estimates.items()},
    }


def covers(one: dict[str, Any], estimator: str) -> bool:
    """Whether an interval holds the truth."""
    _, low, high = one["estimates"][estimator]
    return bool(low <= one["truth"] <= high)


def rows_of(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per kind and estimator."""
    rows = []
    for kind in KINDS:
        some = [one for one in found if one["kind"] == kind]
        for name in ESTIMATORS:
            errors = [one["estimates"][name][0] - one["truth"] for one in some]
            widths = [one["estimates"][name][2] - one["estimates"][name][1] for one in some]
            trusted = [covers(one, name) for one in some if not one["doubts"]]
            rows.append(
                {
                    "policy": kind,
                    "estimator": name + (" (default)" if name == RECOMMENDED else ""),
                    "covered": f"{sum(covers(one, name) for one in some)} of {len(some)}",
                    "covered where no doubt is raised": f"{sum(trusted)} of {len(trusted)}",
                    "bias": f"{statistics.mean(errors):+.3f}",
                    "rms error": f"{statistics.mean(e * e for e in errors) ** 0.5:.3f}",
                    "interval's width": f"{statistics.mean(widths):.3f}",
                    "effective share": f"{statistics.mean(one['effective'] / one['rollouts'] for one in some):.2f}",
                }
            )
    return rows


def main() -> None:
    """Command line."""
    import tempfile

    parser = arguments(__doc__, repeats=20)
    parser.add_argument(
        "--runs", type=Path, nargs="+", required=True, help="finished run folders with a clone checkpoint"
    )
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    starts = [(run, 2 * number + place) for number, run in enumerate(chosen.runs) for place in range(2)]
    windows = max(1, round(chosen.repeats / len(starts)))
    group, updates = (2, 2) if chosen.quick else (40, 60)
    started, found = time.perf_counter(), []
    for run_dir, seed in starts[:1] if chosen.quick else starts:
        with tempfile.TemporaryDirectory() as folder:
            found += repeats(
                Bench.of(run_dir, seed), Path(folder), 1 if chosen.quick else windows, group, seed, updates
            )
        print(f"{run_dir.name} seed {seed}: {len(found)} judged, {time.perf_counter() - started:.0f} s", flush=True)
    report("off_policy", rows_of(found), {"repeats": found, "seconds": time.perf_counter() - started}, chosen.out)


if __name__ == "__main__":
    main()
