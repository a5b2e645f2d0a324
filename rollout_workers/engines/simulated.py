"""An engine that decodes nothing: random codes and tokens after the time decoding would have taken.

For planning a cluster without GPUs: worker, records, verifier, transport, replay buffer and learner are the real ones,
only the base LM and its decoding are left out. What it makes is noise; ``world_hash`` and ``codebook_hash`` of its
records say ``simulated``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import PositiveFloat, ValidationError
from transformers import PreTrainedTokenizerBase

from configs.schema import RolloutConfig as RolloutSettings
from configs.schema import Section
from latent_control.bases.loading import load_config
from latent_control.decoding.prefix_tree import PrefixTree
from latent_control.decoding.stop_strings import stopped_length
from latent_control.policies.latent import LatentPolicy
from latent_control.pretrained import base_path, read_shape
from latent_control.records import Generation
from latent_control.text import end_tokens, load_tokenizer
from rollout_workers.engines.protocol import DecodeJob
from rollout_workers.rollouts import HostSpec

SIMULATED = "simulated"


class SimulatedOptions(Section):
    """``rollout.engine_options``, e.g. ``{tokens_per_second: 1500, mean_tokens: 200}``."""

    tokens_per_second: PositiveFloat
    """What a worker decodes over all its rows, as ``benchmarks/decode.py`` or ``benchmarks/gpu.py`` measured it."""
    mean_tokens: PositiveFloat | None = None
    """Lengths are geometric with this mean, cut at ``rollout.max_new_tokens``; ``None``: every response has full
    length."""


def read_options(settings: RolloutSettings) -> SimulatedOptions:
    """The options of ``settings``.

    Raises:
        ValueError: one is missing, unknown or no positive number.
    """
    try:
        return SimulatedOptions.model_validate(settings.engine_options)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(["rollout.engine_options", *map(str, first["loc"])])
        raise ValueError(
            f"{place}: {first['msg']}; engine simulated takes {', '.join(SimulatedOptions.model_fields)}"
        ) from error


class SimulatedEngine:
    """Uniform codes and tokens at a stated rate and length; a rollout depends on its own seed alone."""

    ships_features = True
    tree: PrefixTree | None = None

    def __init__(
        self,
        options: SimulatedOptions,
        tokenizer: PreTrainedTokenizerBase,
        *,
        level: str,
        num_actions: int | None,
        width: int,
        dtype: torch.dtype,
        stop: Sequence[str] = (),
        stateless: bool = False,
    ) -> None:
        """``num_actions`` is ``None`` where an action is a token; ``width`` and ``dtype`` are the features', which are
        those of choices alone where the policy is ``stateless``."""
        self.stateless = stateless
        self.options, self.tokenizer, self.level = options, tokenizer, level
        self.num_actions, self.width, self.dtype, self.stop = num_actions, width, dtype, stop
        self.ends = end_tokens(tokenizer)
        self.words = np.setdiff1d(np.arange(len(tokenizer)), self.ends)
        """An end token amid a response would end its text."""
        self.world_hash = self.codebook_hash = SIMULATED

    @classmethod
    def load(cls, spec: HostSpec, settings: RolloutSettings, **_: object) -> SimulatedEngine:
        """Stand in for the model of ``spec``, of which only tokenizer and shapes are read; needs no device.

        Raises:
            ValueError: wrong ``rollout.engine_options``, or no such checkpoint.
        """
        trust, latent = spec.trust_remote_code, spec.level == "latent"
        base = base_path(spec.checkpoint) if latent else spec.checkpoint
        config = load_config(base, trust_remote_code=trust)
        dtype = getattr(torch, spec.dtype) if spec.dtype != "auto" else config.dtype or torch.float32
        shape, width = read_shape(Path(spec.checkpoint)) if latent else None, config.get_text_config().hidden_size
        return cls(
            read_options(settings),
            load_tokenizer(base, trust_remote_code=trust),
            level=spec.level,
            num_actions=None if shape is None else shape.num_actions,
            stateless=shape is not None and shape.policy_kind == "mlp",
            width=width if shape is None else shape.state_width(width),
            dtype=dtype,
            stop=settings.stop,
        )

    def use(self, policy: LatentPolicy) -> None:
        """Nothing is steered."""

    def generate(self, job: DecodeJob) -> Generation:
        """Noise of the right shapes; takes the tokens' number divided by ``tokens_per_second``, however many steps that
        were."""
        rows = [self._row(seed, job.max_new_tokens) for seed in job.seeds]
        lengths = torch.tensor([len(tokens) for tokens, _, _ in rows])
        live = torch.arange(job.max_new_tokens) < lengths[:, None]
        tokens, actions = torch.zeros(live.shape, dtype=torch.long), torch.full(live.shape, -1)
        tokens[live] = torch.from_numpy(np.concatenate([tokens for tokens, _, _ in rows]))
        actions[live] = torch.from_numpy(np.concatenate([actions for _, actions, _ in rows]))
        choices = self.num_actions or len(self.words)
        fed = [0 if self.stateless else len(prompt) - 1 for prompt in job.prompts for _ in range(job.repeats)]
        return Generation(
            tokens=tokens,
            actions=actions,
            action_logp=live * -float(np.log(choices)),
            lengths=lengths,
            finish_reasons=tuple(reason for _, _, reason in rows),
            versions=self._pass_time(job, live),
            features=tuple(
                torch.zeros(before + int(n), self.width, dtype=self.dtype)
                for before, n in zip(fed, lengths, strict=True)
            )
            if job.keep_features
            else None,
        )

    def rescore(self, *_: object, **__: object) -> None:
        """Noise has no log-probabilities."""

    def _row(self, seed: int, limit: int) -> tuple[np.ndarray, np.ndarray, str]:
        """Tokens [T], actions [T] and finish reason of the rollout with this seed."""
        stream, mean = np.random.default_rng(seed), self.options.mean_tokens
        length = limit if mean is None else int(stream.geometric(min(1.0, 1 / mean)))
        stops = mean is not None and length <= limit
        tokens = stream.choice(self.words, size=min(length, limit))
        if stops and self.ends:
            tokens[-1] = self.ends[0]
        if (kept := stopped_length(self.tokenizer, self.stop, tokens.tolist())) is not None:
            tokens, stops = tokens[:kept], True
        actions = tokens if self.num_actions is None else stream.integers(self.num_actions, size=len(tokens))
        return tokens, actions, "stop" if stops else "length"

    def _pass_time(self, job: DecodeJob, live: torch.Tensor) -> torch.Tensor:
        """Sleep as long as decoding takes; versions [B, T] of the policy that is told between steps of equal length."""
        steps, seconds = int(live.any(0).sum()), int(live.sum()) / self.options.tokens_per_second
        versions = torch.where(live, 0, -1)
        if job.refresh is None:
            time.sleep(seconds)
            return versions
        for step in range(steps):
            versions[live[:, step], step] = job.refresh()
            time.sleep(seconds / steps)
        return versions
