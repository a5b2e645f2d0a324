"""Opening what is steered: a run (its last policy), one checkpoint, or an export; and its task, where that is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from configs.renamed import rename
from configs.schema import RolloutConfig, RunConfig
from latent_control.model import LatentActionLM
from latent_control.text import encode_text
from pipeline.runs.environment import calm_libraries
from pipeline.serving import export
from rollout_workers.openai_api.protocol import ModelLimits
from rollout_workers.tasks import EpisodeTask, Failure, Prompt, Score, Task, build_task
from rollout_workers.token_verdicts import judged_tokens

MOST_TOKENS = 64
"""New tokens where neither a run nor an export says how many."""
KNOWN_PROMPTS = 500
"""Held-out prompts that are recognised when typed, and offered to pick from."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A policy that can be steered, with its task if it has one."""

    name: str
    model: LatentActionLM
    tokenizer: Any
    config: RunConfig | None
    task: Task | None
    note: str
    """Why there is no task; empty when there is one"""
    prompts: tuple[Prompt, ...]
    """The first held-out ones"""
    limits: ModelLimits

    @property
    def rollout(self) -> RolloutConfig:
        """How training sampled codes and where its answers ended; the policy's chances are shown at its temperature."""
        return RolloutConfig() if self.config is None else self.config.rollout

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, as the rollouts had them."""
        return encode_text(self.tokenizer, text, chat=self.config is not None and self.config.task.chat)

    def prompt(self, text: str) -> Prompt | None:
        """The held-out prompt with this very text."""
        return next((prompt for prompt in self.prompts if prompt.text == text), None)

    def score(self, prompt: Prompt, tokens: Sequence[int]) -> Score | Failure:
        """The verifier's verdict on generated ``tokens``, weighed as in training."""
        assert self.task is not None and self.config is not None
        return judged_tokens(self.task, self.config, self.tokenizer, prompt, tokens)


def load(target: Path, *, base: str | None = None, device: str | None = None) -> Loaded:
    """Open ``target``.

    Args:
        base: where the base LM lies now, if it moved since training.
        device: default: a GPU if there is one.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: no policy over codes is there, it is damaged, or its base LM is missing or another.
    """
    calm_libraries()
    source = export.find(target)
    config, note = _config(source)
    model, tokenizer = source.load(config, base)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = model.hosted().eval().requires_grad_(False).to(place)
    task, prompts, note = _task(config, note)
    name = source.checkpoint.name if source.run_dir is None else f"{source.run_dir.name}/{source.checkpoint.name}"
    limits = ModelLimits(
        model=name,
        num_actions=model.config.num_actions,
        span=model.config.span,
        positions=getattr(model.base.decoder.config, "max_position_embeddings", None),
        max_tokens=_most_tokens(source, config),
        vocabulary=model.base.lm.get_input_embeddings().weight.shape[0],
    )
    return Loaded(
        name=name, model=model, tokenizer=tokenizer, config=config, task=task, note=note, prompts=prompts, limits=limits
    )


def _config(source: export.Source) -> tuple[RunConfig | None, str]:
    """The config of a run, or of the run that an export came from; or ``None`` and why."""
    if source.run_dir is not None:
        return source.config(), ""
    recorded = export.read_provenance(source.checkpoint).get("config")
    if recorded is None:
        return None, f"{source.checkpoint.name} lies in no run, so its task is not known: answers are not scored"
    rename(recorded)
    try:
        return RunConfig.model_validate(recorded), ""
    except ValidationError as error:
        first = error.errors()[0]
        return None, f"the config in {export.PROVENANCE} is of another version ({first['msg']}): answers are not scored"


def _task(config: RunConfig | None, note: str) -> tuple[Task | None, tuple[Prompt, ...], str]:
    """(task, its first held-out prompts, why there is none)."""
    if config is None:
        return None, (), note
    try:
        task = build_task(config.task)
        if isinstance(task, EpisodeTask):
            return None, (), f"{task.name} has several turns: type what the policy sees of one; answers are not scored"
        heldout = task.prompts("heldout")
        return task, tuple(heldout[index] for index in range(min(len(heldout), KNOWN_PROMPTS))), ""
    except (ValueError, OSError, ImportError) as error:
        return None, (), f"the task {config.task.name} cannot be built here ({error}): answers are not scored"


def _most_tokens(source: export.Source, config: RunConfig | None) -> int:
    if config is not None:
        return config.rollout.max_new_tokens
    if (source.checkpoint / "generation_config.json").is_file():
        return export.defaults(source.checkpoint).max_new_tokens or MOST_TOKENS
    return MOST_TOKENS
