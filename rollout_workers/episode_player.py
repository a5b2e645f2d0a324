"""Plays episodes of text environments side by side: one batched decode per turn, then one step of every world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from configs.schema import Reward, Turns
from latent_control.distributions import rollout_seed
from latent_control.text import end_tokens
from rollout_workers.engines import DecodeJob, RolloutEngine
from rollout_workers.environments.client import Lost, Worlds
from rollout_workers.environments.protocol import Step
from rollout_workers.generated_row import Row, joined, row_of
from rollout_workers.tasks.encoding import decode_response, encode_prompt
from rollout_workers.tasks.environment_task import EpisodeTask
from rollout_workers.tasks.protocol import Failure, Prompt, Score
from rollout_workers.tasks.rewards import Response, weigh
from rollout_workers.tools.worlds import ToolWorlds


@dataclass(frozen=True, kw_only=True, slots=True)
class PlayedEpisode:
    """A finished rollout, judged; of an episode also what each turn brought."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    row: Row
    text: str
    verdict: Score | Failure
    turn_rewards: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))


@dataclass(kw_only=True)
class _Episode:
    """An episode while it is played."""

    prompt: Prompt
    ids: list[int]
    """Everything so far: what the next response follows."""
    prompt_length: int
    seed: int
    turns: list[Row] = field(default_factory=list)
    observations: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    lost: Failure | None = None
    end: str = ""


@dataclass(frozen=True, kw_only=True)
class Player:
    """What the episodes of a worker share."""

    task: EpisodeTask
    worlds: Worlds | ToolWorlds
    limits: Turns
    reward: Reward
    chat: bool
    max_prompt_tokens: int
    stop: tuple[str, ...] = ()
    """``rollout.stop``"""
    verifying: list[float] = field(default_factory=list)
    """As a ``ResponsePlayer``'s; stays empty, an environment judges while it steps."""

    def play(self, engine: RolloutEngine, prompts: Sequence[Prompt], job: DecodeJob) -> list[PlayedEpisode]:
        """``job.repeats`` episodes of each prompt, prompts outer; ``job.prompts`` is not read.

        Raises:
            ValueError: an environment cannot be started, or an opening is longer than ``task.max_prompt_tokens``.
        """
        episodes = self._begin(engine, [prompt for prompt in prompts for _ in range(job.repeats)], job)
        numbers = list(range(len(episodes)))
        for turn in range(self.limits.max_turns):
            live = [number for number in numbers if not episodes[number].end]
            if not live:
                break
            generation = engine.generate(
                replace(
                    job,
                    prompts=tuple(tuple(episodes[number].ids) for number in live),
                    repeats=1,
                    seeds=tuple(rollout_seed(episodes[number].seed, turn) for number in live),
                    keep_responses=turn + 1 < self.limits.max_turns,
                )
            )
            for place, number in enumerate(live):
                self._act(engine, episodes[number], row_of(generation, place))
            outcomes = self.worlds.step({number: episodes[number].texts[-1] for number in live})
            for number in live:
                self._see(engine, episodes[number], outcomes[number], job.max_new_tokens)
        return [self._finished(episode, job.max_new_tokens) for episode in episodes]

    def close(self) -> None:
        """End the environments' processes."""
        self.worlds.close()

    def _begin(self, engine: RolloutEngine, prompts: Sequence[Prompt], job: DecodeJob) -> list[_Episode]:
        openings = self.worlds.begin([prompt.metadata for prompt in prompts])
        episodes = []
        for prompt, opening, seed in zip(prompts, openings, job.seeds, strict=True):
            opened = self.task.opened(prompt, opening)
            ids = encode_prompt(engine.tokenizer, opened, chat=self.chat)
            if len(ids) > self.max_prompt_tokens:
                raise ValueError(
                    f"the opening of {prompt.id} has {len(ids)} tokens, more than "
                    f"task.max_prompt_tokens={self.max_prompt_tokens}: raise it"
                )
            episodes.append(_Episode(prompt=opened, ids=ids, prompt_length=len(ids), seed=seed))
        return episodes

    def _act(self, engine: RolloutEngine, episode: _Episode, row: Row) -> None:
        episode.turns.append(row)
        episode.ids.extend(row.tokens.tolist())
        episode.texts.append(decode_response(engine.tokenizer, row.tokens.tolist(), self.stop))

    def _see(self, engine: RolloutEngine, episode: _Episode, outcome: Step | Lost, room: int) -> None:
        """Take in what came of the last action: the episode ends, or the observation is what the next one follows."""
        if isinstance(outcome, Lost):
            episode.lost, episode.end = Failure(kind=outcome.kind, message=outcome.message), "lost"
            return
        episode.steps.append(outcome)
        ends = {
            "terminated": outcome.terminated,
            "environment_limit": outcome.truncated,
            "turn_limit": len(episode.turns) == self.limits.max_turns,
        }
        episode.end = next((name for name, reached in ends.items() if reached), "")
        if episode.end:
            return
        closed, most = episode.ids[-1] in end_tokens(engine.tokenizer), self.limits.max_observation_tokens
        seen = self.task.seen(engine.tokenizer, outcome.observation, most, chat=self.chat, closed=closed)
        if len(episode.ids) + len(seen) + room > self.limits.max_tokens:
            episode.end = "token_limit"
            return
        episode.observations.append(seen)
        episode.ids.extend(seen)

    def _finished(self, episode: _Episode, max_new_tokens: int) -> PlayedEpisode:
        row = joined(episode.turns, episode.observations, episode.end)
        text = "\n".join(episode.texts)
        judged: Score | Failure
        if episode.lost is not None:
            judged = episode.lost
        else:
            ended = episode.end == "terminated"
            limit = self.limits.max_turns * max_new_tokens
            response = Response(text=text, new_tokens=int(row.generated.sum()), limit=limit, stopped=ended)
            found = self.task.judged(episode.prompt, episode.texts, episode.steps, truncated=not ended)
            judged = found if isinstance(found, Failure) else weigh(self.task.name, self.reward, found, response)
        return PlayedEpisode(
            prompt=episode.prompt,
            prompt_ids=tuple(episode.ids[: episode.prompt_length]),
            row=row,
            text=text,
            verdict=judged,
            turn_rewards=np.array([step.reward for step in episode.steps], np.float32),
        )
