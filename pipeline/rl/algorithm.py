"""RLlib's Algorithm for latent-action RL: ``training_step`` is one update of the policy."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_OPTIMIZER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, LEARNER_RESULTS, WEIGHTS_SEQ_NO

from configs.schema import Improve, RunConfig
from latent_control.pretrained import array_hash
from learners.settings import Fault
from pipeline.rl.accounting import Accounting, Records
from pipeline.rl.guards import Guards
from pipeline.rl.heldout import play_heldout
from pipeline.rl.learner_timeout import LearnerTimeout
from pipeline.rl.ledger import Attempt
from pipeline.rl.published_policies import PublishedPolicies
from pipeline.rl.request_stream import STREAMS, RecordedStream, RequestMaker, RequestStream
from pipeline.rl.rollout_metrics import IdleTime, rollout_metrics, worker_metrics
from pipeline.rl.rollout_pool import FinishedRequest, PartLost, RolloutPool, this_node
from pipeline.rl.shared_pool import MemberPool
from pipeline.rl.worker_group import WorkerGroup
from pipeline.rl.worker_health import Health
from pipeline.runs.errors import RunError
from rollout_workers.rollouts import PolicyVersion
from rollout_workers.tasks import build_task

LEARNER_MODULE = f"{COMPONENT_LEARNER}/{COMPONENT_RL_MODULE}"
LEARNER_OPTIMIZER = f"{COMPONENT_LEARNER}/{COMPONENT_OPTIMIZER}"


class LatentRL(Algorithm):
    """Samples with the latent policy, updates it, publishes it: ``train()`` is one update."""

    def setup(self, config: AlgorithmConfig) -> None:
        """Build workers and learner (RLlib), then publish version 0.

        Raises:
            RunError: no worker could start.
        """
        try:
            super().setup(config)
        except IndexError as error:
            # RLlib logs why, goes on, and stumbles over having no worker to ask.
            raise RunError(
                "no rollout worker could start: the log above says why ('Validation of EnvRunner failed!')"
            ) from error
        run: RunConfig = config.env_config["run"]
        self.published = PublishedPolicies()
        self.pool: RolloutPool = RolloutPool(
            self.env_runner_group,
            timeout=run.cluster.worker_timeout_seconds,
            stamp=self.published.stamp,
            node=this_node(),
            health=Health(run.cluster),
        )
        self.worker_group = WorkerGroup(self.env_runner_group, self.pool)
        self.learner_timeout = LearnerTimeout(
            self.learner_group, run.cluster.learner_timeout_seconds, self._report_silent_learners
        )
        self.use(run)
        self.publish(0)
        self.idle = IdleTime(self.pool)

    def use(self, run_config: RunConfig) -> None:
        """Begin with ``run_config``: a new stream of requests, nothing open, nothing recorded."""
        self.run_config = run_config
        self.accounting = Accounting(self.pool, self.published)
        self.guards = Guards(self.improve, self.published, self.pool)
        make = RequestMaker(
            config=run_config,
            prompt_count=len(build_task(run_config.task).prompts("train")),
            ships_features=self.config.env_config["ships_features"],
            latent=self.config.env_config["worker"].host.level == "latent",
            published=self.published,
        )
        self.stream: RequestStream = STREAMS[self.improve.mode](make, self.pool, self.accounting)

    def share(self, pool: MemberPool) -> None:
        """Sample with the workers behind ``pool``, which are those of other runs, too."""
        pool.stamp_by(self.published.stamp)
        self.pool = pool
        self.use(self.run_config)
        self.idle = IdleTime(pool)

    def attach(self, records: Records, earlier: Sequence[Attempt] = ()) -> None:
        """Record every update into ``records`` from now on; ``earlier`` is what the ledger has of updates before."""
        self.accounting.attach(records)
        self.stream.curriculum.learn(earlier)

    def follow(self, batches: Iterator[list[FinishedRequest]]) -> None:
        """Train on ``batches`` from now on, each sampled with the policy that its requests name."""
        self.pool.keep_policies()
        self.stream = RecordedStream(self.stream, batches)

    @property
    def improve(self) -> Improve:
        """The section of the config this algorithm is about."""
        assert self.run_config.improve is not None
        return self.run_config.improve

    @property
    def policy(self) -> PolicyVersion:
        """The policy as last published."""
        return self.published.current

    # -- one update --------------------------------------------------------------------------------------------------

    def training_step(self) -> None:
        """Sample, check, update, record, publish."""
        batch = self.stream.next_batch()
        self.guards.check(batch)
        self._log_batch(batch)
        started = time.perf_counter()
        with self.learner_timeout.watch(), self.stream.serving():
            results = self.learner_group.update(**self._minibatches(batch))
        seconds_updating = time.perf_counter() - started
        self.metrics.aggregate(results, key=LEARNER_RESULTS)
        fault = Fault(round(self.metrics.peek((LEARNER_RESULTS, DEFAULT_MODULE_ID, "update_broken"), default=0.0)))
        self.accounting.record(batch, skipped=fault.reason)
        self.guards.count_skipped(fault.reason)
        started = time.perf_counter()
        self.publish(self.policy.version + 1)
        seconds_publishing = time.perf_counter() - started
        self._log({"updates_skipped": self.guards.skipped, "seconds_updating": seconds_updating})
        self._log({"seconds_publishing": seconds_publishing, **self.idle.shares(seconds_updating)})

    def _log_batch(self, batch: Sequence[FinishedRequest]) -> None:
        self._log(self.stream.metrics | worker_metrics(self.pool))
        self._log(rollout_metrics(batch, version=self.policy.version, num_actions=int(self.config.action_space.n)))
        self.metrics.aggregate([finished.metrics for finished in batch], key=ENV_RUNNER_RESULTS)

    def _log(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.metrics.log_value(("improve", name), value, window=1)

    def _minibatches(self, batch: Sequence[FinishedRequest]) -> dict[str, Any]:
        """How the learner takes a batch, as RLlib's arguments."""
        improve, learners = self.improve, max(1, self.run_config.cluster.num_learners)
        rows = max(1, math.ceil(sum(one.trained for one in batch) / learners))
        return {
            "training_data": TrainingData(episodes_refs=[one.training_rollouts() for one in batch if one.trained]),
            "num_epochs": improve.epochs,
            "minibatch_size": math.ceil(rows / improve.minibatches),
            "num_total_minibatches": improve.epochs * improve.minibatches,
            "shuffle_batch_per_epoch": improve.minibatches > 1,
        }

    def _report_silent_learners(self, text: str) -> None:
        self.pool.watch.say(text, "learner_silent", update=self.policy.version + 1)

    def play_heldout(self) -> dict[str, float]:
        """The current policy's results on held-out prompts; see ``pipeline.rl.heldout``."""
        results = play_heldout(self.run_config, self.pool, self.published)
        self.idle.restart()
        return results

    def publish(self, version: int) -> None:
        """Make the learner's weights the policy of all requests to come, and of those in flight where that is
        wanted."""
        with self.learner_timeout.watch():
            state = self.learner_group.get_state(components=LEARNER_MODULE, inference_only=True)
        self.weights = state[COMPONENT_LEARNER][COMPONENT_RL_MODULE][DEFAULT_MODULE_ID]
        policy = PolicyVersion(version=version, weights_hash=array_hash(self.weights), weights=ray.put(self.weights))
        self.published.add(policy, refresh_in_flight=self.improve.refresh_in_flight)

    def flush(self) -> None:
        """Put the rollouts and the ledger of all updates so far on the disk; ``PartLost`` when some are gone."""
        self.accounting.flush(self.stream.unfinished())

    # -- state, as plain arrays ---------------------------------------------------------------------------------------

    def learner_state(self) -> dict[str, Any]:
        """Weights, optimiser state, version, and the place in the stream of prompts: all that a resumed run needs.

        What is in flight is asked for again: its prompts come first in a resumed run, so that none is lost or doubled.
        """
        with self.learner_timeout.watch():
            state = self.learner_group.get_state(components=[LEARNER_MODULE, LEARNER_OPTIMIZER])[COMPONENT_LEARNER]
        return {
            "version": self.policy.version,
            "skipped": self.guards.skipped,
            "unasked": self.stream.unfinished(),
            "next_position": max(self.stream.next_position, self.policy.version * self.improve.prompts_per_update),
            COMPONENT_RL_MODULE: state[COMPONENT_RL_MODULE],
            COMPONENT_OPTIMIZER: state[COMPONENT_OPTIMIZER],
        }

    def restore_learner(self, state: dict[str, Any]) -> None:
        """Continue from ``learner_state``.

        Raises:
            PartLost: a learner actor died of it, or did not answer in time.
        """
        parts = {name: state[name] for name in (COMPONENT_RL_MODULE, COMPONENT_OPTIMIZER)}
        with self.learner_timeout.watch():
            self.learner_group.set_state({COMPONENT_LEARNER: {**parts, WEIGHTS_SEQ_NO: state["version"]}})
        # RLlib passes over a learner that is lost here.
        if not self.learner_timeout.all_healthy():
            raise PartLost("a learner actor was lost while it was given its state")
        self.guards.restore(state.get("skipped", 0))  # checkpoints of versions before the ledger have none
        self.stream.restore(state)
        self.publish(state["version"])

    def cleanup(self) -> None:
        """Stop workers and learners; ``flush`` first what is to be kept."""
        self.accounting.stop()
        self.published.stop()
        self.worker_group.stop()
        self.pool.stop()
        super().cleanup()
