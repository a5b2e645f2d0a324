"""RLlib's Algorithm for latent-action RL: two loops, one synchronous and one asynchronous."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import gymnasium as gym
import psutil
import ray
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_OPTIMIZER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, LEARNER_RESULTS, WEIGHTS_SEQ_NO

from configs.schema import Improve, RunConfig
from latent_control.algorithms import ALGORITHMS
from latent_control.analysis.measures import usage_measures
from latent_control.distributions import rollout_seed
from latent_control.pretrained import array_hash
from learners.learner import PolicyLearner
from learners.rl_module import PolicyModule
from pipeline.replay.writer import Added
from pipeline.rl import staleness
from pipeline.rl.heldout import heldout_requests
from pipeline.rl.ledger import Attempt, Ledger, Outcome
from pipeline.rl.prompt_order import chunk_count, chunks, equal_chunk_count, prompt_at
from pipeline.rl.rollout_pool import Answer, PartLost, RolloutPool, this_node
from pipeline.rl.worker_group import Crew
from pipeline.rl.worker_health import Health
from pipeline.runs.errors import RunError
from rollout_workers.env_runner import LMEnvRunner
from rollout_workers.model_host import WorkerSettings
from rollout_workers.rollouts import HostSpec, PolicyVersion, Rollout, RolloutRequest, RolloutSummary
from rollout_workers.tasks import build_task
from rollout_workers.weight_sync import make_board

T = TypeVar("T")

# Seconds between two looks at the workers while the learner works.
SERVE_EVERY = 0.01

FAILING_UPDATES = 3

BROKEN = (
    "loss, gradient or log-probabilities are not finite, or are not those of the tokens written (logp_gap, "
    "rescored_gap)"
)

LEARNER_MODULE = f"{COMPONENT_LEARNER}/{COMPONENT_RL_MODULE}"
LEARNER_OPTIMIZER = f"{COMPONENT_LEARNER}/{COMPONENT_OPTIMIZER}"


class LatentRLConfig(AlgorithmConfig):
    """RLlib's config with this project's classes as defaults."""

    def __init__(self, algo_class: type[Algorithm] | None = None) -> None:
        super().__init__(algo_class=algo_class or LatentRL)

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        """The policy module; its ``model_config`` comes with ``rl_module``."""
        return RLModuleSpec(module_class=PolicyModule)

    def get_default_learner_class(self) -> type[PolicyLearner]:
        """The learner."""
        return PolicyLearner


def workers_config(config: RunConfig, settings: WorkerSettings, num_actions: int = 2) -> AlgorithmConfig:
    """The rollout workers' half of an RLlib config, with every default that loses or delays rollouts switched off."""
    rllib = LatentRLConfig()
    rllib.environment(
        env=None,
        observation_space=gym.spaces.Discrete(2),
        action_space=gym.spaces.Discrete(num_actions),
        env_config={"worker": settings},
    )
    rllib.framework("torch")
    rllib.env_runners(
        env_runner_cls=LMEnvRunner,
        num_env_runners=config.rollout.num_workers,
        num_cpus_per_env_runner=config.rollout.cpus_per_worker,
        num_gpus_per_env_runner=config.rollout.gpus_per_worker,
        create_local_env_runner=False,
        sample_timeout_s=None,
        max_requests_in_flight_per_env_runner=2,
    )
    rllib.fault_tolerance(
        restart_failed_env_runners=True, delay_between_env_runner_restarts_s=0.5, env_runner_health_probe_timeout_s=0.1
    )
    rllib.debugging(seed=config.seed, log_level="ERROR")
    rllib.merge_env_runner_states = False
    rllib.broadcast_env_runner_states = False
    return rllib


def ships_features(config: RunConfig, host: HostSpec) -> bool:
    """Whether rollouts bring the base's features along; a policy that is the whole model reads none."""
    whole = host.level == "token" and host.token_trains == "all"
    return config.ships_features and not whole


def algorithm_config(
    config: RunConfig,
    host: HostSpec,
    *,
    num_actions: int,
    reads: str,
    late_blocks: int,
    learning_rate: float,
    span: int = 1,
) -> AlgorithmConfig:
    """An RLlib config for the ``improve`` section of ``config``, starting from the policy of ``host``."""
    improve, cluster = config.improve, config.cluster
    assert improve is not None
    dtype = "bfloat16" if improve.mixed_precision == "bf16" else "float32"
    settings = WorkerSettings(
        host=host, policy_dtype=dtype, task=config.task, rollout=config.rollout, reward=config.reward
    )
    module = {
        "level": host.level,
        "checkpoint": host.checkpoint,
        "token_trains": host.token_trains,
        "token_blocks": host.token_blocks,
        "trust_remote_code": host.trust_remote_code,
    }
    sampling = {"temperature": config.rollout.temperature, "top_k": config.rollout.top_k}
    rllib = workers_config(config, settings, num_actions)
    rllib.env_config |= {"run": config, "ships_features": ships_features(config, host)}
    critic = ALGORITHMS[improve.algorithm].critic
    rllib.rl_module(rl_module_spec=RLModuleSpec(module_class=PolicyModule, model_config={**module, "critic": critic}))
    rllib.training(
        lr=learning_rate, grad_clip=improve.gradient_clip, grad_clip_by="global_norm", num_epochs=improve.epochs
    )
    rllib.learners(
        learner_class=PolicyLearner,
        num_learners=cluster.num_learners,
        num_cpus_per_learner=cluster.cpus_per_learner,
        num_gpus_per_learner=cluster.gpus_per_learner,
        add_default_connectors_to_learner_pipeline=False,
        learner_config_dict={
            "improve": improve,
            "recompute": not ships_features(config, host),
            "module": module,
            "sampling": sampling,
            "reads": reads,
            "span": span,
            "late_blocks": late_blocks,
            "dtype": host.dtype,
        },
    )
    return rllib


class LatentRL(Algorithm):
    """Samples with the latent policy, updates it, publishes it: ``train()`` is one update."""

    @classmethod
    def get_default_config(cls) -> AlgorithmConfig:
        """An empty config of the right class."""
        return LatentRLConfig()

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
        self.run_config: RunConfig = config.env_config["run"]
        self.ships_features: bool = config.env_config["ships_features"]
        self.latent: bool = config.env_config["worker"].host.level == "latent"
        self.num_actions = int(config.action_space.n)
        self.prompt_count = len(build_task(self.run_config.task).prompts("train"))
        timeout = self.run_config.cluster.worker_timeout_seconds
        health = Health(self.run_config.cluster)
        self.pool = RolloutPool(
            self.env_runner_group, timeout=timeout, stamp=self._stamped, node=this_node(), health=health
        )
        self.crew = Crew(self.env_runner_group, self.pool)
        self.replay: Any = None
        self.replay_written: ray.ObjectRef | None = None
        self.replay_actor = ""
        """The incarnation of the replay buffer's actor that has what is not on the disk yet."""
        self.board: Any = None
        self.published: dict[int, str] = {}
        self.script: Iterator[Sequence[Answer]] | None = None
        """Where set, what each update trains on, instead of what the two loops would sample
        (``pipeline.integrity.reproduce``)."""
        self.ledger: Ledger | None = None
        self.quarantine: Callable[[int, list[Rollout]], None] | None = None
        """Keeps the rollouts of a skipped update."""
        self.skipped = 0
        """Updates skipped so far."""
        self.failing = 0
        """Updates in a row in which verifiers failed too often."""
        self.failure_kinds: set[str] = set()
        self.open: dict[int, tuple[int, ...]] = {}
        """Positions in the stream of prompts by request, for those asked for and not yet trained on."""
        self.unasked: deque[int] = deque()
        self.next_position = 0
        self.dropped = 0
        self.publish(0)
        self.updated = time.perf_counter()

    # -- the two loops -----------------------------------------------------------------------------------------------

    def training_step(self) -> None:
        """One update."""
        if self.script is not None:
            self._consume(next(self.script))
        elif self.improve.mode == "async":
            self._asynchronous_step()
        else:
            self._synchronous_step()

    @property
    def improve(self) -> Improve:
        """The section of the config this algorithm is about."""
        assert self.run_config.improve is not None
        return self.run_config.improve

    def _synchronous_step(self) -> None:
        """Sample with the current policy, update it, publish it."""
        requests = self.requests_of(self.policy.version)
        started = time.perf_counter()
        self.pool.submit(requests)
        answers = self.pool.take(request.request_id for request in requests)
        self._log("seconds_sampling", time.perf_counter() - started)
        self._consume(answers)

    def _asynchronous_step(self) -> None:
        """Ask ahead as far as the staleness allows, and train on whatever is finished and may be taken
        (``pipeline.rl.staleness``)."""
        self._ask_ahead()
        started = time.perf_counter()
        answers = self.pool.take_when(self._next_batch)
        self._log("seconds_waiting", time.perf_counter() - started)
        self._log("requests_ready", len(self.pool.answers))
        self._consume(answers)

    def _ask_ahead(self) -> None:
        """Open as many requests as the schedule has room for."""
        parts = self._equal_parts()
        size = self.improve.prompts_per_update // parts
        for _ in range(staleness.room(self.pool.stamps(), per_update=parts, max_staleness=self.improve.max_staleness)):
            while len(self.unasked) < size:
                self.unasked.append(self.next_position)
                self.next_position += 1
            positions = tuple(self.unasked.popleft() for _ in range(size))
            self.pool.submit([self.request(positions)])

    def _equal_parts(self) -> int:
        """Requests per update, all of one size."""
        return equal_chunk_count(
            self.improve.prompts_per_update, self.run_config.most_workers, self.run_config.cluster.num_learners
        )

    def _next_batch(self) -> list[int] | None:
        """What the next update trains on; with ``stale: drop`` what is too old by now is thrown away and asked for
        anew."""
        improve, version = self.improve, self.policy.version
        if improve.stale == "drop":
            gone = staleness.expired(
                self.pool.stamps(), self.pool.answers, version=version, max_staleness=improve.max_staleness
            )
            self.dropped += len(gone)
            dropped = [self.pool.answers.pop(i) for i in gone]
            self._note(
                [
                    entry
                    for answer in dropped
                    for entry in self._entries(answer, "stale", "the policy had moved on too far")
                ]
            )
            self.pool.submit([answer.request for answer in dropped])
        return staleness.next_batch(
            self.pool.stamps(),
            self.pool.answers,
            version=version,
            per_update=self._equal_parts(),
            max_staleness=improve.max_staleness if improve.stale == "wait" else None,
        )

    def requests_of(self, update: int) -> list[RolloutRequest]:
        """The requests of an update in synchronous mode."""
        run, count = self.run_config, self.improve.prompts_per_update
        positions = range(update * count, (update + 1) * count)
        return [
            self.request(part)
            for part in chunks(positions, chunk_count(count, self._pieces(), run.cluster.num_learners))
        ]

    def _pieces(self) -> int:
        """For how many workers work is cut: for all that may come, so that results do not depend on when they do."""
        return max(self.run_config.most_workers, len(self.pool.workers.actor_ids()))

    def request(self, positions: Sequence[int]) -> RolloutRequest:
        """A request for the prompts at these positions of the run's stream of prompts."""
        run, improve = self.run_config, self.improve
        self.open[positions[0]] = tuple(positions)
        places = [prompt_at(p, improve.prompts_per_update, size=self.prompt_count, seed=run.seed) for p in positions]
        return RolloutRequest(
            request_id=positions[0],
            split="train",
            prompt_indices=tuple(index for _, index in places),
            seeds=tuple(rollout_seed(run.seed, update) >> 1 for update, _ in places),
            group_size=improve.group_size,
            policy=self.policy,
            temperature=run.rollout.temperature,
            top_k=run.rollout.top_k,
            ship_features=self.ships_features,
            aliases=improve.aliases if self.latent else None,
            greedy_baseline=ALGORITHMS[improve.algorithm].greedy,
            board=self.board,
        )

    def _stamped(self, request: RolloutRequest) -> RolloutRequest:
        """What a worker gets is to be sampled with the newest policy, however long it has waited."""
        return replace(request, policy=self.policy)

    # -- one update --------------------------------------------------------------------------------------------------

    def _consume(self, answers: Sequence[Answer]) -> None:
        """Update the policy on these answers, store them, publish the new version."""
        self._check_hashes(answers)
        self._log_rollouts(answers)
        self._check_failures(answers)
        started = time.perf_counter()
        results = (
            self._update(answers)
            if self.improve.mode == "sync"
            else self._while_serving(partial(self._update, answers))
        )
        seconds = time.perf_counter() - started
        self.metrics.aggregate(results, key=LEARNER_RESULTS)
        broken = bool(self.metrics.peek((LEARNER_RESULTS, DEFAULT_MODULE_ID, "update_broken"), default=0.0))
        self._keep(answers, broken)
        self._log("seconds_updating", seconds)
        started = time.perf_counter()
        self.publish(self.policy.version + 1)
        self._log("seconds_publishing", time.perf_counter() - started)
        self._log_idle(seconds)

    def _keep(self, answers: Sequence[Answer], broken: bool) -> None:
        """Store the rollouts of an update and enter it into the books; those of one that was skipped go into
        quarantine.

        Raises:
            FloatingPointError: one update too many had to be skipped.
        """
        outcome: Outcome = "skipped" if broken else "trained"
        self._note([entry for answer in answers for entry in self._entries(answer, outcome, BROKEN * broken)])
        for answer in answers:
            del self.open[answer.request.request_id]
        self.skipped += broken
        self._log("updates_skipped", self.skipped)
        if broken and self.quarantine is not None:
            self.quarantine(self.policy.version + 1, [r for answer in answers for r in ray.get(answer.rollouts)])
        elif not broken and self.replay is not None:
            self._store([answer.rollouts for answer in answers])
        if self.skipped > self.improve.max_skipped_updates:
            raise FloatingPointError(
                f"update {self.policy.version + 1} was broken ({BROKEN}), as were {self.skipped - 1} before; the "
                "weights were left as they "
                "are and the rollouts lie in quarantine/. Look at rewards and log-probabilities there, lower "
                "improve.learning_rate, "
                f"or raise improve.max_skipped_updates={self.improve.max_skipped_updates}"
            )

    def _note(self, attempts: Sequence[Attempt]) -> None:
        """Enter attempts into the ledger, after those that workers have lost meanwhile."""
        lost, self.pool.lost = self.pool.lost, []
        if self.ledger is not None:
            for loss in lost:
                if loss.request.request_id in self.open:  # others are of evaluation
                    self.ledger.add(
                        self._attempts(
                            loss.request, loss.attempt, worker=loss.worker, outcome="lost", reason=loss.reason
                        )
                    )
            self.ledger.add(attempts)

    def _entries(self, answer: Answer, outcome: Outcome, reason: str = "") -> list[Attempt]:
        """An answer as the ledger has it."""
        summary, size = answer.summary, answer.request.group_size
        versions = [version for version, _, _ in summary.policies]
        entries = self._attempts(answer.request, answer.attempt, worker=summary.worker, outcome=outcome, reason=reason)
        return [
            replace(
                entry,
                oldest_version=min(versions, default=-1),
                newest_version=max(versions, default=-1),
                rollouts=summary.rollout_ids[i * size : (i + 1) * size],
            )
            for i, entry in enumerate(entries)
        ]

    def _attempts(
        self, request: RolloutRequest, attempt: int, *, worker: int, outcome: Outcome, reason: str
    ) -> list[Attempt]:
        positions = self.open[request.request_id]
        return [
            Attempt(
                position=position,
                attempt=attempt,
                prompt_index=index,
                outcome=outcome,
                reason=reason,
                update=self.policy.version + 1,
                request=request.request_id,
                worker=worker,
            )
            for position, index in zip(positions, request.prompt_indices, strict=True)
        ]

    def flush_ledger(self) -> None:
        """Put the ledger on the disk up to the policy as it is."""
        if self.ledger is not None:
            self._note([])
            self.ledger.flush(self.policy.version, self.published, self.unfinished())

    def unfinished(self) -> list[int]:
        """Positions asked for, or to be asked for next, and not trained on."""
        return sorted([*self.unasked, *chain(*self.open.values())])

    def _update(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """The learner's part: its metrics."""
        improve, learners = self.improve, max(1, self.run_config.cluster.num_learners)
        rows = max(1, math.ceil(sum(a.summary.rollouts for a in answers) / learners))
        with self._learners_in_time():
            results: list[dict[str, Any]] = self.learner_group.update(
                training_data=TrainingData(episodes_refs=[answer.rollouts for answer in answers]),
                num_epochs=improve.epochs,
                minibatch_size=math.ceil(rows / improve.minibatches),
                num_total_minibatches=improve.epochs * improve.minibatches,
                shuffle_batch_per_epoch=improve.minibatches > 1,
            )
        return results

    @contextmanager
    def _learners_in_time(self) -> Iterator[None]:
        """Learner actors that have not answered in time are killed, which those who wait for them see as a loss."""
        timer = threading.Timer(self.run_config.cluster.learner_timeout_seconds, self._kill_silent_learners)
        timer.daemon = True
        if self.learner_group.is_remote:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _kill_silent_learners(self) -> None:
        seconds, learners = self.run_config.cluster.learner_timeout_seconds, self.learner_group._worker_manager.actors()
        silent = f"the {len(learners)} learner actors have" if len(learners) > 1 else "the learner actor has"
        text = (
            f"{silent} not answered for {seconds:g} s; raise cluster.learner_timeout_seconds if that is not long enough"
        )
        self.pool.say(text, "learner_silent", update=self.policy.version + 1)
        for actor in learners.values():
            ray.kill(actor)

    def _while_serving(self, work: Callable[[], T]) -> T:
        """Do ``work`` in a thread; meanwhile this one hands the workers what they ask for."""
        with ThreadPoolExecutor(1) as thread:
            future = thread.submit(work)
            while not wait([future], timeout=SERVE_EVERY).done:
                self.pool.poll()
        return future.result()

    def _check_hashes(self, answers: Sequence[Answer]) -> None:
        """A rollout sampled with weights that were never published, or with older ones than asked for, must never be
        trained on."""
        for answer in answers:
            asked, found = answer.request.policy, answer.summary.policies
            assert asked is not None and all(v >= asked.version and self.published.get(v) == h for v, h, _ in found), (
                f"request {answer.summary.request_id}, to be sampled with policy {asked and asked.version}, "
                f"was sampled with {[(v, h[:12]) for v, h, _ in found]}"
            )

    def _check_failures(self, answers: Sequence[Answer]) -> None:
        """Rollouts that verifiers cannot judge are masked; too many of them for too long are no accident.

        Raises:
            RunError: ``improve.max_failed_share`` was exceeded in ``FAILING_UPDATES`` updates in a row.
        """
        rollouts, failures = sum(a.summary.rollouts for a in answers), sum(a.summary.failures for a in answers)
        reasons = Counter(reason for a in answers for reason in a.summary.failure_kinds)
        for kind in {reason.partition(":")[0]: reason for reason in reasons}.values():
            if (name := kind.partition(":")[0]) not in self.failure_kinds:
                self.failure_kinds.add(name)
                self.pool.say(
                    f"a verifier could not judge a rollout: {kind}", "verifier_failed", update=self.policy.version + 1
                )
        self.failing = self.failing + 1 if failures > self.improve.max_failed_share * rollouts else 0
        if self.failing >= FAILING_UPDATES:
            raise RunError(
                f"verifiers could not judge {failures} of {rollouts} rollouts ({reasons.most_common(1)[0][0]}), and "
                "too many in the "
                f"{FAILING_UPDATES - 1} updates before: repair the reward or the data (latent-control task check), "
                f"or raise improve.max_failed_share={self.improve.max_failed_share:g}"
            )

    def _store(self, refs: list[ray.ObjectRef]) -> None:
        """Hand the rollouts to the replay buffer; one batch may be on its way while the learner works."""
        self._await_replay()
        self.replay_written = self.replay.add.remote(refs)

    def _await_replay(self) -> None:
        if self.replay_written is not None:
            self._stored(ray.get(self.replay_written))
            self.replay_written = None

    def _stored(self, added: Added) -> None:
        if added.lost:
            raise PartLost(
                f"{len(added.lost)} batches of rollouts were lost before they reached the replay buffer: "
                f"{added.lost[0]}"
            )
        if self.replay_actor and added.actor != self.replay_actor:
            raise PartLost("the replay buffer's actor died with rollouts that were not on the disk yet")
        self.replay_actor = added.actor

    def flush_replay(self) -> None:
        """Put every rollout trained on so far on the disk; ``PartLost`` when some of them are gone."""
        if self.replay is not None:
            self._await_replay()
            self._stored(ray.get(self.replay.flush.remote()))
            self.replay_actor = ""

    def _log_rollouts(self, answers: Sequence[Answer]) -> None:
        rewards = [r for a in answers for r in a.summary.rewards if not math.isnan(r)]
        rollouts = sum(a.summary.rollouts for a in answers)
        tokens = sum(a.summary.tokens for a in answers)
        self._log("reward", sum(rewards) / max(1, len(rewards)))
        self._log("success", sum(s for a in answers for s in a.summary.successes) / rollouts)
        for name, value in mean_parts([a.summary for a in answers]).items():
            self._log(f"reward/{name}", value)
        self._log("failures", sum(a.summary.failures for a in answers))
        self._log("rollouts", rollouts)
        self._log("tokens", tokens)
        self._log("tokens_per_rollout", tokens / rollouts)
        self._log("worker_seconds", sum(a.summary.seconds for a in answers))
        self._log("rollout_workers", len(self.pool.workers.actor_ids()))
        self._log("worker_deaths", self.pool.health.deaths)
        self._log("worker_gib", max(self.pool.health.memory.values(), default=0.0))
        self._log("driver_gib", psutil.Process().memory_info().rss / 2**30)
        self._log("rollout_nodes", len({a.summary.node for a in answers}))
        self._log_staleness(answers)
        self._log_codes(answers)
        self.metrics.aggregate(self.pool.metrics, key=ENV_RUNNER_RESULTS)
        self.pool.metrics.clear()

    def _log_staleness(self, answers: Sequence[Answer]) -> None:
        """How many updates old the policy was that chose each action trained on: mean, maximum, shares."""
        actions: Counter[int] = Counter()
        for answer in answers:
            for version, _, count in answer.summary.policies:
                actions[self.policy.version - version] += count
        self._log("staleness_mean", sum(age * count for age, count in actions.items()) / actions.total())
        self._log("staleness_max", max(actions))
        if self.improve.mode == "async":
            for age in range(max(self.improve.max_staleness, *actions) + 1):
                self._log(f"staleness_{age}", actions[age] / actions.total())
            self._log("stale_dropped", self.dropped)
            self.dropped = 0

    def _log_codes(self, answers: Sequence[Answer]) -> None:
        """Health of the codebook by the codes of this update's rollouts: a policy that collapses is seen at once."""
        usage = torch.zeros(self.num_actions, dtype=torch.float64)
        for answer in answers:
            for code, count in answer.summary.code_counts.items():
                usage[code] += count
        if usage.any():
            for name, value in usage_measures(usage / usage.sum()).items():
                self._log(name, value)

    def _log_idle(self, seconds_updating: float) -> None:
        """Shares of the time since the last update in which the learner had nothing to train on, and workers nothing to
        sample."""
        now = time.perf_counter()
        elapsed, self.updated = now - self.updated, now
        self._log("idle_learner", max(0.0, 1 - seconds_updating / elapsed))
        self._log(
            "idle_workers", max(0.0, 1 - self.pool.busy_seconds() / (elapsed * len(self.pool.workers.actor_ids())))
        )

    def _log(self, name: str, value: float) -> None:
        self.metrics.log_value(("improve", name), value, window=1)

    def play_heldout(self) -> dict[str, float]:
        """Held-out prompts played with the policy as published, sampled and greedy, beside training: it touches no
        random stream, no prompt, no replay buffer and no metric of training.

        Returns:
            ``heldout_success`` and ``heldout_reward`` (sampled), ``heldout_greedy`` (success), and what it took.
        """
        started, seen = time.perf_counter(), len(self.pool.metrics)
        run, prompts = self.run_config, self.improve.evaluate_prompts
        means: dict[str, tuple[float, float]] = {}
        tokens = 0
        for mode, temperature in (("sampled", run.rollout.temperature), ("greedy", 0.0)):
            # Requests of training have ids from 0 on.
            requests = heldout_requests(
                run, prompts, self._pieces(), samples=1, temperature=temperature, first_id=-prompts
            )
            self.pool.submit(requests)
            answers = self.pool.take(request.request_id for request in requests)
            self._check_hashes(answers)
            tokens += sum(a.summary.tokens for a in answers)
            rewards = [r for a in answers for r in a.summary.rewards if not math.isnan(r)]
            means[mode] = (
                sum(s for a in answers for s in a.summary.successes) / prompts,
                sum(rewards) / max(1, len(rewards)),
            )
        if self.improve.mode == "sync":  # else answers of training have come in between
            del self.pool.metrics[seen:]
        self.pool.busy_seconds()
        self.updated = time.perf_counter()
        (success, reward), (greedy, _) = means["sampled"], means["greedy"]
        seconds = self.updated - started
        return {
            "heldout_success": success,
            "heldout_reward": reward,
            "heldout_greedy": greedy,
            "heldout_tokens": float(tokens),
            "seconds_heldout": seconds,
        }

    def publish(self, version: int) -> None:
        """Make the learner's weights the policy of all requests to come, and of those in flight where that is
        wanted."""
        with self._learners_in_time():
            state = self.learner_group.get_state(components=LEARNER_MODULE, inference_only=True)
        weights = state[COMPONENT_LEARNER][COMPONENT_RL_MODULE][DEFAULT_MODULE_ID]
        self.weights = weights
        self.policy = PolicyVersion(version=version, weights_hash=array_hash(weights), weights=ray.put(weights))
        self.published[version] = self.policy.weights_hash
        if self.improve.refresh_in_flight:
            self.board = self.board or make_board()
            self.board.publish.remote(self.policy)

    # -- state, as plain arrays ---------------------------------------------------------------------------------------

    def learner_state(self) -> dict[str, Any]:
        """Weights, optimiser state, version, and the place in the stream of prompts: all that a resumed run needs.

        What is in flight is asked for again: its prompts come first in a resumed run, so that none is lost or doubled.
        """
        with self._learners_in_time():
            state = self.learner_group.get_state(components=[LEARNER_MODULE, LEARNER_OPTIMIZER])[COMPONENT_LEARNER]
        return {
            "version": self.policy.version,
            "skipped": self.skipped,
            "unasked": self.unfinished(),
            "next_position": max(self.next_position, self.policy.version * self.improve.prompts_per_update),
            COMPONENT_RL_MODULE: state[COMPONENT_RL_MODULE],
            COMPONENT_OPTIMIZER: state[COMPONENT_OPTIMIZER],
        }

    def restore_learner(self, state: dict[str, Any]) -> None:
        """Continue from ``learner_state``.

        Raises:
            PartLost: a learner actor died of it, or did not answer in time.
        """
        parts = {name: state[name] for name in (COMPONENT_RL_MODULE, COMPONENT_OPTIMIZER)}
        with self._learners_in_time():
            self.learner_group.set_state({COMPONENT_LEARNER: {**parts, WEIGHTS_SEQ_NO: state["version"]}})
        # RLlib passes over a learner that is lost here.
        if self.learner_group.is_remote and self.learner_group._worker_manager.num_healthy_actors() < len(
            self.learner_group
        ):
            raise PartLost("a learner actor was lost while it was given its state")
        self.pool.forget()
        self.open.clear()
        self.skipped = state.get("skipped", 0)  # checkpoints of versions before the ledger have none
        # In sync mode an update's prompts follow from its number.
        self.unasked = deque(state["unasked"] if self.improve.mode == "async" else ())
        self.next_position = state["next_position"]
        self.publish(state["version"])

    def cleanup(self) -> None:
        """Stop workers and learners; ``flush_replay`` first what is to be kept."""
        for helper in (self.replay, self.board):
            if helper is not None:
                ray.kill(helper)  # two that write one replay buffer would be one too many
        self.crew.dissolve()
        self.pool.workers.clear()  # RLlib would wait for what they are at
        super().cleanup()


def mean_parts(summaries: Sequence[RolloutSummary]) -> dict[str, float]:
    """Mean of each part of the score over the judged rollouts of several requests."""
    judged = [(s.rollouts - s.failures, s.part_means) for s in summaries if s.part_means]
    total = sum(count for count, _ in judged)
    return (
        {name: sum(count * means[name] for count, means in judged) / total for name in judged[0][1]} if judged else {}
    )
