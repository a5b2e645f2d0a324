"""The built-in engine: this project's own decoding on a hosted model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from configs.schema import RolloutConfig as RolloutSettings
from latent_control.decoding.generate import generate
from latent_control.decoding.prefix_tree import PrefixTree
from latent_control.decoding.rescoring import choices, rescored_logp
from latent_control.decoding.sampling_params import SamplingParams
from latent_control.decoding.stop_strings import stop_watch
from latent_control.policies.bank import PolicyBank
from latent_control.policies.latent import LatentPolicy
from latent_control.records import Generation
from latent_control.text import left_padded
from latent_control.token_policy import TokenPolicy, WholeModel
from rollout_workers.engines.protocol import DecodeJob
from rollout_workers.model_host import Host, load_host
from rollout_workers.rollouts import HostSpec, Rollout


class LocalEngine:
    """``latent_control.decoding.generate.generate`` on any supported base LM, CPU or GPU."""

    ships_features = True

    def __init__(self, host: Host, settings: RolloutSettings, bank: PolicyBank | None = None) -> None:
        self.host, self.settings, self.bank = host, settings, bank
        self.level, self.world_hash, self.codebook_hash = host.level, host.world_hash, host.codebook_hash
        self.tokenizer: PreTrainedTokenizerBase = host.tokenizer
        frozen = not isinstance(host.policy, WholeModel)
        self.tree = PrefixTree(settings.prefix_cache_mb) if settings.prefix_cache_mb and frozen else None

    @classmethod
    def load(
        cls, spec: HostSpec, settings: RolloutSettings, *, device: torch.device, policy_dtype: torch.dtype
    ) -> LocalEngine:
        """Host the model of ``spec``."""
        return cls(load_host(spec, device, policy_dtype), settings)

    def use(self, policy: LatentPolicy | TokenPolicy) -> None:
        """Steer by this very policy: changes of its weights in place need no further call."""
        self.host = self.host.steered_by(policy)

    def generate(self, job: DecodeJob) -> Generation:
        """Decode, at most ``rollout.batch_size`` rows at once."""
        params = SamplingParams(
            max_new_tokens=job.max_new_tokens,
            temperature=job.temperature,
            top_k=job.top_k,
            batch_size=self.settings.batch_size,
            repeats=job.repeats,
            row_seeds=job.seeds,
            return_features=job.keep_features,
            keep_responses=job.keep_responses,
            aliases=job.aliases,
            watch=stop_watch(self.tokenizer, self.settings.stop),
            decode=job.decode,
            mixture_codes=job.mixture_codes,
            members=job.members,
        )
        with torch.inference_mode():
            return generate(
                self.host.base,
                self.host.actor(self.bank),
                params,
                *left_padded(job.prompts, self.host.base.lm.device),
                refresh=job.refresh,
                static=self.settings.static_cache,
                tree=self.tree,
            )

    def rescore(self, rollouts: Sequence[Rollout], *, temperature: float, top_k: int | None) -> list[np.ndarray]:
        """As the protocol says."""
        actor = self.host.actor()
        found = rescored_logp(
            self.host.base,
            actor,
            [r.prompt_tokens.tolist() for r in rollouts],
            [r.tokens.tolist() for r in rollouts],
            [r.actions.tolist() for r in rollouts],
            temperature=temperature,
            top_k=top_k,
            supports=[r.support if len(r.support) else None for r in rollouts],
        )
        chosen = [choices(r.generated, len(r), actor.span) for r in rollouts]
        # A log-probability that is no number must not pass for a place without one.
        columns = [logp.float().nan_to_num(nan=np.inf, posinf=np.inf, neginf=-np.inf).cpu().numpy() for logp in found]
        return [np.where(places, column, np.float32(np.nan)) for places, column in zip(chosen, columns, strict=True)]
