"""The Ray actor that samples for many policies on one base LM: rows of one batch belong to different ones."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch

from latent_control.decoding.prefix_tree import prompt_counts
from latent_control.policies.bank import PolicyBank
from latent_control.policies.mlp import MlpPolicy
from latent_control.records import Generation
from rollout_workers.engines.local import LocalEngine
from rollout_workers.engines.protocol import DecodeJob
from rollout_workers.env_runner import LMEnvRunner, baselines_of, job_of, weights_of
from rollout_workers.episode_player import PlayedEpisode
from rollout_workers.generated_row import row_of
from rollout_workers.model_host import MemberSettings, load_host
from rollout_workers.response_player import ResponsePlayer, player_for
from rollout_workers.rollout_record import Behaviour, rescored, rollouts_of, summary_of
from rollout_workers.rollouts import PolicyVersion, Rollout, RolloutRequest, RolloutSummary
from rollout_workers.tasks import Prompt, build_task
from rollout_workers.tasks.rewards import reward_hash

Answer = tuple[RolloutSummary, dict[str, Any]]


class MemberFailed(RuntimeError):
    """The work for one policy went wrong in a worker, which the others' has nothing to do with."""

    def __init__(self, member: str, reason: str) -> None:
        super().__init__(member, reason)
        self.member, self.reason = member, reason

    def __str__(self) -> str:
        return f"{self.member}: {self.reason}"


@contextmanager
def blamed(member: str) -> Iterator[None]:
    """A block in which whatever goes wrong is a ``MemberFailed`` of this policy."""
    try:
        yield
    except Exception as error:  # tasks and verifiers of users: anything
        raise MemberFailed(member, reason_of(error)) from error


def reason_of(error: Exception) -> str:
    """What an error is and says, in a line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


class HostedMember:
    """A policy that a worker samples for, with its task and verifier."""

    def __init__(self, settings: MemberSettings, module: Any) -> None:
        """``module``: its RLModule, with the weights that it starts from."""
        worker = settings.worker
        self.settings, self.module = settings, module
        self.task = build_task(worker.task)
        self.player = player_for(worker, self.task)
        self.reward_hash = reward_hash(worker.task, worker.reward)
        self.version, self.hash = -1, ""

    def use(self, policy: PolicyVersion) -> bool:
        """Load the weights of ``policy``; whether they were others."""
        if (policy.version, policy.weights_hash) == (self.version, self.hash):
            return False
        self.module.set_state(weights_of(policy))
        self.version, self.hash = policy.version, policy.weights_hash
        return True


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A request among those that are worked on together."""

    request: RolloutRequest
    member: HostedMember
    prompts: list[Prompt]
    encoded: tuple[tuple[int, ...], ...]
    """Token ids; none of an episode, whose turns are decoded by themselves."""
    job: DecodeJob
    baselines: list[float | None]

    @property
    def name(self) -> str:
        """Of its member."""
        return self.member.settings.name


class BankEnvRunner(LMEnvRunner):
    """An ``LMEnvRunner`` whose requests name their policy, each with a task of its own."""

    def make_env(self) -> None:
        """Load language model and tokenizer; tasks come with requests."""
        self.hosted = self.settings.host
        self.policy_dtype = getattr(torch, self.settings.policy_dtype)
        assert self.hosted is not None, "a worker of many policies hosts their world"
        host = load_host(self.hosted, self.device, self.policy_dtype)
        assert isinstance(host.policy, MlpPolicy), "members of a bank are mlp policies"
        self.bank = PolicyBank(host.policy)
        self.engine = self.local = LocalEngine(host, self.settings.rollout, self.bank)
        self.seats: dict[str, HostedMember] = {}

    def assert_healthy(self) -> None:
        """Raise unless the model is there."""
        assert self.local.level == "latent"

    def set_state(self, state: Any) -> None:
        """Weights travel with requests."""

    def stop(self) -> None:
        """End the environments' processes."""
        for seat in self.seats.values():
            seat.player.close()

    def sample_requests(self, requests: Sequence[RolloutRequest]) -> tuple[Any, ...]:
        """The rollouts of each request, and as the last value the list of what the driver sees of each.

        Raises:
            MemberFailed: the task or the verifier of one of them, or its weights, cannot be used.
        """
        started, before = time.perf_counter(), prompt_counts(self.local.tree)
        parts = [self._part(request) for request in requests]
        played = self._play(parts)
        read, found = (now - then for now, then in zip(prompt_counts(self.local.tree), before, strict=True))
        rollouts = [self._records(part, played[number]) for number, part in enumerate(parts)]
        seconds, rows = time.perf_counter() - started, sum(map(len, rollouts))
        answers = []
        for part, own in zip(parts, rollouts, strict=True):
            share = len(own) / rows
            counts = (round(share * read), round(share * found))
            answers.append(self._answer(part, own, seconds * share, counts))
        return *rollouts, answers

    def _part(self, request: RolloutRequest) -> _Part:
        settings: MemberSettings = request.member
        with blamed(settings.name):
            member = self._seat(settings)
            assert request.policy is not None, "a request for a member brings its policy along"
            if member.use(request.policy):
                self.bank.put(settings.name, member.module.policy.state_dict())
            prompts = [member.task.prompts(request.split)[index] for index in request.prompt_indices]
            player, limit = member.player, settings.worker.rollout.max_new_tokens
            encoded = player.encoded(self.local, prompts) if isinstance(player, ResponsePlayer) else ()
            self.local.use(member.module.policy)
            baselines = baselines_of(request, self.local, player, prompts, limit)
            return _Part(
                request=request,
                member=member,
                prompts=prompts,
                encoded=encoded,
                job=job_of(request, limit),
                baselines=baselines,
            )

    def _seat(self, settings: MemberSettings) -> HostedMember:
        """The member of this name, made again where its settings are others."""
        seat = self.seats.get(settings.name)
        if seat is not None and seat.settings == settings:
            return seat
        if seat is not None:
            seat.player.close()
        spec = self.config.get_rl_module_spec(spaces=self.get_spaces(), inference_only=True)
        module = replace(spec, model_config=dict(settings.module)).build().to(self.device, self.policy_dtype).eval()
        self.seats[settings.name] = seat = HostedMember(settings, module)
        return seat

    def _play(self, parts: Sequence[_Part]) -> dict[int, list[PlayedEpisode]]:
        """Decode and judge, by the part's place; parts that are decoded alike share their batches."""
        played: dict[int, list[PlayedEpisode]] = {}
        alike: dict[DecodeJob, list[int]] = defaultdict(list)
        for number, part in enumerate(parts):
            if isinstance(part.member.player, ResponsePlayer):
                alike[replace(part.job, seeds=())].append(number)
                continue
            with blamed(part.name):
                self.local.use(part.member.module.policy)
                played[number] = part.member.player.play(self.local, part.prompts, part.job)
        for job, numbers in alike.items():
            played |= zip(numbers, self._decode(job, [parts[number] for number in numbers]), strict=True)
        return played

    def _decode(self, job: DecodeJob, parts: Sequence[_Part]) -> Iterator[list[PlayedEpisode]]:
        """One batch of all parts, then each part's own verifier."""
        try:
            generation = self._generate(job, parts)
        except (ValueError, RuntimeError) as error:
            if len(parts) == 1:
                raise MemberFailed(parts[0].name, reason_of(error)) from error
            for part in parts:  # whose fault it is shows when each is decoded by itself
                yield from self._decode(job, [part])
            return
        start = 0
        for part in parts:
            end, player = start + len(part.prompts) * job.repeats, part.member.player
            assert isinstance(player, ResponsePlayer)
            with blamed(part.name):
                rows = [row_of(generation, row) for row in range(start, end)]
                yield player.judged(self.local, part.prompts, part.encoded, rows)
            start = end

    def _generate(self, job: DecodeJob, parts: Sequence[_Part]) -> Generation:
        """The rows of all parts, in their order."""
        members = chain(*([self.bank.blend(part.name)] * len(part.prompts) for part in parts))
        return self.local.generate(
            replace(
                job,
                prompts=tuple(chain(*(part.encoded for part in parts))),
                seeds=tuple(chain(*(part.job.seeds for part in parts))),
                members=tuple(members),
            )
        )

    def _records(self, part: _Part, played: Sequence[PlayedEpisode]) -> list[Rollout]:
        member, request = part.member, part.request
        behaviour = Behaviour(
            version=member.version,
            hashes={member.version: member.hash},
            reward_hash=member.reward_hash,
            worker=self.worker_index,
        )
        with blamed(part.name):
            rollouts = rollouts_of(self.local, request, played, behaviour, part.baselines)
            if request.temperature > 0 and request.decode == "code":
                self.local.use(member.module.policy)
                rollouts = rescored(self.local, request, rollouts, member.version)
        return rollouts

    def _answer(self, part: _Part, rollouts: list[Rollout], seconds: float, prompt_tokens: tuple[int, int]) -> Answer:
        summary = summary_of(
            part.request,
            rollouts,
            worker=self.worker_index,
            hashes={part.member.version: part.member.hash},
            seconds=seconds,
            prompt_tokens=prompt_tokens,
        )
        return summary, self.counted(summary)
