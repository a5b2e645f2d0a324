"""Plays the episodes of an agent program: many programs at once, their calls decoded together."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from configs.schema import Reward
from latent_control.distributions import rollout_seed
from rollout_workers.engines import DecodeJob, RolloutEngine
from rollout_workers.environments.protocol import Step
from rollout_workers.episode_player import PlayedEpisode
from rollout_workers.gateway.endpoint import Endpoint
from rollout_workers.gateway.programs import AgentProgram, allowed, told
from rollout_workers.gateway.session import Call, EpisodeSession, SessionLimits
from rollout_workers.gateway.task import GatewayTask
from rollout_workers.generated_row import Row, joined, row_of
from rollout_workers.tasks.environment_task import verdict
from rollout_workers.tasks.protocol import Failure, Prompt, Score
from rollout_workers.tasks.rewards import Response, weigh

LOOKED = 0.02
"""Seconds between two looks at programs that have no call open."""


@dataclass(frozen=True, kw_only=True)
class GatewayPlayer:
    """What the episodes of a worker share."""

    task: GatewayTask
    limits: SessionLimits
    reward: Reward
    endpoint: Endpoint = field(default_factory=Endpoint)
    verifying: list[float] = field(default_factory=list)
    """As a ``ResponsePlayer``'s; stays empty, a program judges while it plays."""

    def play(self, engine: RolloutEngine, prompts: Sequence[Prompt], job: DecodeJob) -> list[PlayedEpisode]:
        """``job.repeats`` episodes of each prompt, prompts outer; ``job.prompts`` is not read."""
        every = [prompt for prompt in prompts for _ in range(job.repeats)]
        parts = tuple(self.task.programs.parts)
        sessions = [
            EpisodeSession(prompt=prompt, seed=seed, limits=self.limits, tokenizer=engine.tokenizer, parts=parts)
            for prompt, seed in zip(every, job.seeds, strict=True)
        ]
        self.endpoint.open(sessions)
        waiting, running = deque(sessions), dict[EpisodeSession, AgentProgram]()
        try:
            while waiting or running:
                while waiting and len(running) < self.task.programs.parallel:
                    session = waiting.popleft()
                    running[session] = self._started(session)
                if calls := self.endpoint.waiting(len(running), LOOKED):
                    _decode(engine, job, calls)
                for session in [one for one, program in running.items() if program.ended()]:
                    self._leave(session, running.pop(session))
        finally:
            for session, program in running.items():  # decoding failed
                self._leave(session, program)
        return [self._finished(engine, job, session) for session in sessions]

    def close(self) -> None:
        """Stop listening."""
        self.endpoint.close()

    def _started(self, session: EpisodeSession) -> AgentProgram:
        programs = self.task.programs
        variables = allowed(programs.variables) | told(
            session.id, session.key, self.endpoint.address, session.prompt.metadata
        )
        return AgentProgram(programs.command, variables, seconds=programs.seconds)

    def _leave(self, session: EpisodeSession, program: AgentProgram) -> None:
        session.close(program.late, program.how())
        self.endpoint.forget(session)
        program.close()

    def _finished(self, engine: RolloutEngine, job: DecodeJob, session: EpisodeSession) -> PlayedEpisode:
        row, ids = _row_of(engine, job, session)
        text = "\n".join(session.texts)
        judged: Score | Failure
        if session.problem is not None:
            judged = session.problem
        else:
            ended = session.end == "terminated"
            limit = self.limits.turns.max_turns * self.limits.max_new_tokens
            response = Response(text=text, new_tokens=int(row.generated.sum()), limit=limit, stopped=ended)
            steps = [Step(observation="", reward=reward, success=session.success) for reward in session.rewards]
            score = verdict(steps, truncated=not ended)
            parts = {**dict.fromkeys(self.task.programs.parts, 0.0), **session.more, **score.parts}
            judged = weigh(self.task.name, self.reward, replace(score, parts=parts), response)
        return PlayedEpisode(
            prompt=replace(session.prompt, text=session.opening or session.prompt.text),
            prompt_ids=ids,
            row=row,
            text=text,
            verdict=judged,
            turn_rewards=np.array(session.rewards, np.float32),
        )


def _decode(engine: RolloutEngine, job: DecodeJob, calls: Sequence[tuple[EpisodeSession, Call]]) -> None:
    """One batch for all calls that allow as many new tokens."""
    for limit in sorted({call.limit for _, call in calls}):
        some = [(session, call) for session, call in calls if call.limit == limit]
        generation = engine.generate(
            replace(
                job,
                prompts=tuple(call.ids for _, call in some),
                repeats=1,
                # As of the built-in player: turn k of an episode draws from stream (seed, k).
                seeds=tuple(rollout_seed(session.seed, session.calls) for session, _ in some),
                max_new_tokens=limit,
                keep_responses=True,
            )
        )
        for place, (session, call) in enumerate(some):
            if call.answer.set_running_or_notify_cancel():  # its client is there
                row = row_of(generation, place)
                session.take(call, row)
                call.answer.set_result(row)


def _row_of(engine: RolloutEngine, job: DecodeJob, session: EpisodeSession) -> tuple[Row, tuple[int, ...]]:
    """The episode's row and the ids of its first prompt; of an episode without any call one token, which is masked as
    all of a failure's are."""
    if session.turns:
        row = joined(session.turns, session.observations, session.end if session.problem is None else "lost")
        return row, tuple(session.ids[: session.prompt_length])
    generation = engine.generate(replace(job, prompts=((0,),), repeats=1, seeds=(session.seed,), max_new_tokens=1))
    return replace(row_of(generation, 0), finish_reason="lost", generated=np.ones(1, bool)), (0,)
