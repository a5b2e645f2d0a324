"""Which codes carry the gain of RL: the rise of the mean reward along a path from the policy before it to the one after
it.

The path goes straight through the policies' weights, in ``PIECES`` pieces. By the policy gradient theorem the mean
reward rises over a piece by the expectation, over rollouts of the policy in its middle, of the sum over choices of (log
p at the piece's end - log p at its beginning) of the code that was chosen, times the rollout's advantage. Summed over
the pieces that is the whole gain, and each choice's part belongs to its code: positive when the code becomes likelier
where it pays, or less likely where it costs.

Rollouts are fresh ones of held-out prompts. Those of training would not do: the policy learned from their very luck, so
its changes agree with their rewards more than with those to come. It leaves out what is of second order within a piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from configs.schema import RunConfig
from latent_control.analysis.explain import Walker
from latent_control.decoding.generate import generate
from latent_control.decoding.sampling_params import SamplingParams
from latent_control.decoding.stop_strings import stop_watch
from latent_control.distributions import rollout_seed
from latent_control.model import latent_actor
from latent_control.records import Generation
from latent_control.text import left_padded
from pipeline.pages.explorer.gain import leave_one_out
from pipeline.pages.explorer.reading import Clock, Models
from rollout_workers.tasks import Prompt, Score, Task
from rollout_workers.tasks.encoding import encode_prompt
from rollout_workers.token_verdicts import judged_tokens

PIECES, PROMPTS, GROUP, ROUNDS = 8, 8, 8, 5
"""A round plays ``GROUP`` rollouts of each of ``PROMPTS`` prompts in every piece; the most rounds."""
STREAM = 5
"""Names the random streams, apart from those of training and evaluation."""


@dataclass(frozen=True, kw_only=True)
class Walked:
    """The c choices of all rollouts along the path."""

    codes: np.ndarray
    """[c]"""
    positions: np.ndarray
    """[c]"""
    prompts: np.ndarray
    """[c] int, the prompt each was made for"""
    parts: np.ndarray
    """[c]: their sum over the number of rollouts is the gain"""
    sizes: np.ndarray
    """[prompts], judged rollouts of each"""
    rewards: np.ndarray
    """[PIECES], mean reward in the middle of each piece"""


def walk(models: Models, config: RunConfig, task: Task, clock: Clock, share: float) -> Walked | None:
    """As many rounds as fit until ``share`` of the budget is spent, one at least; ``None`` when nothing could be
    judged."""
    heldout = task.prompts("heldout")
    walker = Walker(models.model, models.before, models.model.policy)
    found: list[tuple[np.ndarray, ...]] = []
    judged: list[tuple[int, int, float]] = []  # prompt, piece, reward
    for number in range(min(ROUNDS, len(heldout) // PROMPTS)):
        if number and clock.over(share):
            break
        prompts = [heldout[index] for index in range(number * PROMPTS, (number + 1) * PROMPTS)]
        for piece in range(PIECES):
            parts, rewards = _piece(walker, models, config, task, prompts, (number, piece))
            found.append((*parts[:2], parts[2] + number * PROMPTS, parts[3], np.full(len(parts[0]), piece)))
            judged += [(number * PROMPTS + prompt, piece, reward) for prompt, reward in rewards]
    if not judged:
        return None
    prompt, piece_of, reward = (np.array(column) for column in zip(*judged, strict=True))
    codes, positions, groups, parts_, pieces = (np.concatenate(columns) for columns in zip(*found, strict=True))
    sizes = np.bincount(piece_of, minlength=PIECES)
    # Each piece counts as a mean of its own, whatever share of its rollouts could be judged.
    weights = len(judged) / np.maximum(sizes, 1)
    means = np.bincount(piece_of, reward, minlength=PIECES) / np.maximum(sizes, 1)
    return Walked(
        codes=codes,
        positions=positions,
        prompts=groups,
        parts=parts_ * weights[pieces],
        sizes=np.bincount(prompt),
        rewards=means,
    )


def _piece(
    walker: Walker, models: Models, config: RunConfig, task: Task, prompts: Sequence[Prompt], place: tuple[int, int]
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], list[tuple[int, float]]]:
    """(codes, positions, prompts, parts) of the choices of one piece's rollouts, and (prompt, reward) of the
    rollouts."""
    number, piece = place
    model = models.model
    encoded = [encode_prompt(models.tokenizer, prompt, chat=config.task.chat) for prompt in prompts]
    policy = walker.at((piece + 0.5) / PIECES)
    out = generate(
        model.base,
        replace(latent_actor(model), stack=policy, head=policy.head),
        SamplingParams(
            max_new_tokens=config.rollout.max_new_tokens,
            temperature=models.temperature,
            top_k=models.top_k,
            row_seeds=[rollout_seed(config.seed, STREAM, number, piece, row) for row in range(len(prompts) * GROUP)],
            batch_size=config.rollout.batch_size,
            repeats=GROUP,
            watch=stop_watch(models.tokenizer, config.rollout.stop),
        ),
        *left_padded(encoded, model.codebook.device),
    )
    rewards = _rewards(out, models, config, task, prompts)
    rows = [row for row, reward in enumerate(rewards) if reward is not None]
    known = [(row // GROUP, float(reward)) for row, reward in enumerate(rewards) if reward is not None]
    if not rows:
        return (np.empty(0, int), np.empty(0, int), np.empty(0, int), np.empty(0)), []
    owner = np.array([prompt for prompt, _ in known])
    advantages = leave_one_out(np.array([reward for _, reward in known]), owner)
    texts = [encoded[row // GROUP] + out.tokens[row, : int(out.lengths[row])].tolist() for row in rows]
    actions = [out.actions[row, : int(out.lengths[row])].tolist() for row in rows]
    ends = (piece / PIECES, (piece + 1) / PIECES)
    at, rises = walker.rises(texts, actions, ends, temperature=models.temperature, top_k=models.top_k)
    row_of, position = at[:, 0], at[:, 1]
    codes = np.array([actions[r][p] for r, p in at.tolist()])
    return (codes, position, owner[row_of], rises * advantages[row_of]), known


def _rewards(
    out: Generation, models: Models, config: RunConfig, task: Task, prompts: Sequence[Prompt]
) -> list[float | None]:
    """The verifier's reward of each row; ``None`` where it failed."""
    rows = [tokens[: int(length)].tolist() for tokens, length in zip(out.tokens, out.lengths, strict=True)]
    verdicts = [judged_tokens(task, config, models.tokenizer, prompts[r // GROUP], row) for r, row in enumerate(rows)]
    return [float(verdict.reward) if isinstance(verdict, Score) else None for verdict in verdicts]
