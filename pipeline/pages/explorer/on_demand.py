"""One rollout explained on demand: what the page shows of it, as the page's own data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from configs.schema import RunConfig
from pipeline.pages.explorer.build import shown_rollouts
from pipeline.pages.explorer.collected import Collected, Vocabulary
from pipeline.pages.explorer.corpus import corpus_of
from pipeline.pages.explorer.reading import Clock, Models, read
from pipeline.pages.explorer.why import Explainer, prompt_of
from pipeline.pages.records import as_data
from rollout_workers.tasks import Task

MOST_TOKENS, MOST_KNOWN = 2048, 1000
"""Of a rollout: at each one all codes are compared; letters of what the task knows of its prompt."""


def explained(row: Mapping[str, Any], models: Models, config: RunConfig, task: Task) -> dict[str, Any]:
    """A row of the replay buffer as the parts ``vocabulary``, ``prompts``, ``rollouts`` and ``why`` of a dataset.

    Raises:
        ValueError: it has no code, or too many tokens.
    """
    if row["level"] != "latent" or not 0 < len(row["tokens"]) <= MOST_TOKENS:
        raise ValueError(
            f"rollout {row['rollout_id']} has {len(row['tokens'])} tokens at level {row['level']}: counterfactuals are "
            f"of up to {MOST_TOKENS} tokens with codes"
        )
    shape, words = models.model.config, Vocabulary(models.tokenizer)
    corpus = corpus_of([{**row, "reward": row["reward"] or 0.0}], num_actions=shape.num_actions, span=shape.span)
    found = read(corpus, models, Clock(math.inf), 1.0)
    some = Collected(corpus=corpus, shown=corpus, rows=np.arange(1), found=found, sums=None, walked=None, why=[])
    (shown,) = shown_rollouts(some, words, list(corpus.prompt_texts))
    why = Explainer(corpus, models, config, task, words).explain(0)
    prompt = prompt_of(task, corpus.prompt_ids[0], corpus.prompt_texts[0])
    known = "" if prompt is None else json.dumps(prompt.metadata, default=str)[:MOST_KNOWN]
    return {
        "rollouts": [as_data(replace(shown, advantage=row.get("advantage")))],
        "why": [as_data(why)],
        "prompts": list(corpus.prompt_texts),
        "vocabulary": list(words.texts()),
        "summary": {"turns": int(corpus.turns[-1]) + 1, "heldout": "variant" in row, "expected": known},
    }
