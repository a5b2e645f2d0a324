"""Why this output: at each choice the codes' probabilities, the token each would have produced, and counterfactual
continuations."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from configs.schema import RunConfig
from latent_control.analysis.explain import play_on, read_choices, replay, tokens_of_codes
from latent_control.decoding.stop_strings import stopped_length
from pipeline.pages.explorer.corpus import Corpus
from pipeline.pages.explorer.reading import Models, token_batch
from pipeline.pages.explorer.records import Ending, ExplainedChoice, Option, Why
from pipeline.pages.records import as_data
from rollout_workers.tasks import EpisodeTask, Prompt, Score, Task
from rollout_workers.token_verdicts import judged_tokens

COMPARED, OPTIONS, MASSES = 32, 8, 6
"""Likeliest codes whose tokens are computed at a choice; codes and tokens of them that are listed."""
ALTERNATIVES, LEAST_CHANCE, ENDED = 3, 0.005, 16
"""Other tokens played to the end at a choice, those no less likely than this (before or after RL); choices of a rollout
so treated."""
MOST_CHARACTERS = 1_200_000
"""Of the page, for all explanations: long responses have many choices."""
Lexicon = Callable[[int], int]
"""From a token id to its number in the page's vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """A token at a choice with the codes that produce it: ``Alternative(token=5, code=3, before=0.2, after=0.6,
    codes=4)``."""

    token: int
    code: int
    """The likeliest of them after RL."""
    before: float
    after: float
    codes: int


def to_explain(corpus: Corpus, rows: np.ndarray, count: int) -> list[int]:
    """The rollouts ``rows`` worth explaining: the best and the worst of late groups that are of two minds, then others
    spread evenly."""
    chosen: list[int] = []
    for group in sorted(set(corpus.groups[rows].tolist()), reverse=True):
        members = rows[corpus.groups[rows] == group]
        best, worst = members[np.argmax(corpus.rewards[members])], members[np.argmin(corpus.rewards[members])]
        if corpus.rewards[best] > corpus.rewards[worst] and len(chosen) + 2 <= count:
            chosen += [int(best), int(worst)]
    rest = [r for r in rows.tolist() if r not in set(chosen)]
    spread = np.linspace(len(rest) - 1, 0, min(len(rest), count - len(chosen))).round().astype(int)
    return chosen + [rest[i] for i in spread]


def alternatives(
    tokens: Sequence[int], codes: Sequence[int], before: Sequence[float], after: Sequence[float]
) -> list[Alternative]:
    """The tokens that codes at one choice lead to, with the probability of each before and after RL; the likeliest (of
    both)
    first."""
    found = []
    for token in dict.fromkeys(tokens):
        places = [i for i, t in enumerate(tokens) if t == token]
        best = max(places, key=lambda i: after[i])
        chances = sum(before[i] for i in places), sum(after[i] for i in places)
        found.append(Alternative(token=token, code=codes[best], before=chances[0], after=chances[1], codes=len(places)))
    return sorted(found, key=lambda a: -max(a.before, a.after))


class Explainer:
    """Explains rollouts of a corpus one by one."""

    def __init__(self, corpus: Corpus, models: Models, config: RunConfig, task: Task, lexicon: Lexicon) -> None:
        self.corpus, self.models, self.config, self.task, self.lexicon = corpus, models, config, task, lexicon

    def all(self, rows: Sequence[int]) -> list[Why]:
        """As many of ``rows`` as the page's size allows, one at least."""
        done: list[Why] = []
        size = 0
        for row in rows:
            if done and size > MOST_CHARACTERS:
                break
            done.append(self.explain(row))
            size += len(json.dumps(as_data(done[-1]), separators=(",", ":")))
        return done

    @torch.no_grad()
    def explain(self, row: int) -> Why:
        """Every choice of rollout ``row``."""
        corpus, models = self.corpus, self.models
        at = corpus.choices[corpus.rows[corpus.choices] == row]
        batch = token_batch(corpus, [row], models.model.codebook.device)
        policies = (models.before, models.model.policy)
        told = read_choices(models.model, policies, batch, temperature=models.temperature, top_k=models.top_k)
        before, after = told.policies
        taken = torch.from_numpy(corpus.actions[at]).to(before.device)
        # The code that was taken comes first, whatever its chance.
        ranks = torch.maximum(before, after).scatter(1, taken[:, None], 2.0)
        codes = ranks.topk(min(COMPARED, ranks.shape[1])).indices
        tokens, certainty = tokens_of_codes(models.model, told.final, codes)
        columns = [x.tolist() for x in (codes, before.gather(1, codes), after.gather(1, codes), tokens, certainty)]
        choices = list(zip(*columns, strict=True))
        others = [
            [a for a in alternatives(c[3], c[0], c[1], c[2]) if a.token != int(corpus.tokens[t])]
            for c, t in zip(choices, at, strict=True)
        ]
        # Where a world answers, an ending would have to be played in it.
        endings = {} if isinstance(self.task, EpisodeTask) else self._endings(row, at, others)
        steps = [
            ExplainedChoice(
                position=int(corpus.positions[t]),
                options=tuple(self._option(o) for o in list(zip(*c, strict=True))[:OPTIONS]),
                masses=tuple(
                    (self.lexicon(a.token), a.before, a.after, a.codes)
                    for a in alternatives(c[3], c[0], c[1], c[2])[:MASSES]
                ),
                endings=endings.get(i, ()),
            )
            for i, (c, t) in enumerate(zip(choices, at, strict=True))
        ]
        return Why(rollout=row, steps=tuple(steps))

    def _option(self, values: tuple[int, float, float, int, float]) -> Option:
        code, before, after, token, certainty = values
        return Option(code=code, before=before, after=after, token=self.lexicon(token), certainty=certainty)

    def _endings(
        self, row: int, at: np.ndarray, others: Sequence[Sequence[Alternative]]
    ) -> dict[int, tuple[Ending, ...]]:
        """By choice: the ending after the code that was taken, and after the likeliest other tokens."""
        likely = [[a for a in some if max(a.before, a.after) >= LEAST_CHANCE][:ALTERNATIVES] for some in others]
        chance = [sum(max(a.before, a.after) for a in some) for some in likely]
        open_choices = sorted(sorted((i for i, c in enumerate(chance) if c > 0), key=lambda i: -chance[i])[:ENDED])
        asked = [
            (i, code) for i in open_choices for code in (int(self.corpus.actions[at[i]]), *(a.code for a in likely[i]))
        ]
        if not asked:
            return {}
        played = self._played(row, [(int(at[i]), code) for i, code in asked])
        found: dict[int, tuple[Ending, ...]] = {}
        for (i, code), (tokens, ending) in zip(asked, played, strict=True):
            found[i] = (*found.get(i, ()), self._judged(row, code, tokens, ending))
        return found

    def _played(self, row: int, asked: Sequence[tuple[int, int]]) -> list[tuple[list[int], list[int]]]:
        """(tokens before, tokens after) of each (token of the corpus, code there): all at once, in half precision one
        by one."""
        corpus, model, start = self.corpus, self.models.model, int(self.corpus.offsets[row])
        prompt, limit = corpus.prompt_tokens[row].tolist(), self.config.rollout.max_new_tokens
        kept = [corpus.tokens[start:t].tolist() for t, _ in asked]
        if model.base.dtype == torch.float32:
            limits = [max(1, limit - len(tokens)) for tokens in kept]
            endings = play_on(model, [prompt + tokens for tokens in kept], [code for _, code in asked], limits)
            return [self._stopped(*one) for one in zip(kept, endings, strict=True)]
        played: list[tuple[list[int], list[int]]] = []
        for t, code in asked:
            whole = replay(model, prompt, [*corpus.actions[start:t].tolist(), code], max(limit, t - start + 1))
            played.append(self._stopped(whole[: t - start], whole[t - start :]))
        return played

    def _stopped(self, kept: list[int], ending: list[int]) -> tuple[list[int], list[int]]:
        """``ending`` up to the token that completes a string of ``rollout.stop``."""
        length = stopped_length(self.models.tokenizer, self.config.rollout.stop, kept + ending)
        return kept, ending if length is None else ending[: max(1, length - len(kept))]

    def _judged(self, row: int, code: int, kept: list[int], ending: list[int]) -> Ending:
        prompt = prompt_of(self.task, self.corpus.prompt_ids[row], self.corpus.prompt_texts[row])
        tokenizer = self.models.tokenizer
        score = None if prompt is None else judged_tokens(self.task, self.config, tokenizer, prompt, kept + ending)
        judged = score if isinstance(score, Score) else None
        return Ending(
            code=code,
            tokens=tuple(self.lexicon(token) for token in ending),
            reward=None if judged is None else float(judged.reward),
            success=judged is not None and judged.success,
        )


def prompt_of(task: Task, prompt_id: str, text: str) -> Prompt | None:
    """The task's prompt with this id (``<task>/<split>/<index>``); ``None`` when the task has another text there by
    now."""
    _, split, index = prompt_id.rsplit("/", 2)
    prompts = task.prompts("train" if split == "train" else "heldout")
    if not index.isdecimal() or int(index) >= len(prompts):
        return None
    prompt = prompts[int(index)]
    # an episode's text is its opening observation
    return prompt if prompt.text == text or isinstance(task, EpisodeTask) else None
