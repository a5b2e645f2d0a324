"""A latent-action LM as transformers knows models: ``AutoModelForCausalLM.from_pretrained(EXPORT)`` and ``generate``.

Importing ``latent_control`` registers the class; no remote code is involved.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import ModelOutput

from latent_control.model import LatentActionLM, token_nll

# Of a position all codes' next-token logits are made at once: so many positions at a time.
POSITIONS = 64
IGNORED = -100
KNOWN = ("do_sample", "temperature", "top_k", "max_new_tokens", "max_length", "num_return_sequences", "eos_token_id", "pad_token_id")
"""Settings of a ``GenerationConfig`` that mean something here."""
SILENT = ("bos_token_id", "transformers_version", "_from_model_config", "use_cache")


class LatentActionAutoConfig(PreTrainedConfig):
    """``config.json`` of an export: what transformers asks for; shapes are in ``latent_action_config.json`` beside it."""

    model_type = "latent_action"

    def __init__(self, vocab_size: int = 0, hidden_size: int = 0, num_actions: int = 0, span: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size, self.num_actions, self.span = vocab_size, hidden_size, num_actions, span


@dataclass
class LatentGeneration(ModelOutput):
    """What ``generate(..., return_dict_in_generate=True)`` returns."""

    sequences: torch.LongTensor | None = None
    """[B * num_return_sequences, P + T]: prompts as they came, then the generated tokens, right padded"""
    codes: torch.LongTensor | None = None
    """[B * num_return_sequences, T], the code behind each generated token; -1 after the end"""
    code_log_probs: torch.FloatTensor | None = None
    """[B * num_return_sequences, T], under the distribution it was taken from"""


class LatentActionForCausalLM(PreTrainedModel, GenerationMixin):
    """The policy picks a code, the world model emits its most likely token.

    ``generate`` samples *codes* (``do_sample``, ``temperature``, ``top_k`` are of codes); ``codes`` and ``allowed_codes`` let the caller
    steer. ``forward`` gives the marginal next-token distribution, sum_a pi(a) p(x | a).
    """

    config_class = LatentActionAutoConfig
    main_input_name = "input_ids"

    def __init__(self, config: LatentActionAutoConfig, latent: LatentActionLM | None = None) -> None:
        super().__init__(config)
        if latent is None:
            raise ValueError("a latent-action model is loaded from an export, not made from a config: use from_pretrained")
        self.latent = latent
        self.generation_config = default_generation(latent.base.lm)

    @classmethod
    def of(cls, latent: LatentActionLM) -> LatentActionForCausalLM:
        """Around a model in memory."""
        return cls(auto_config(latent), latent.eval())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *_: Any, **kwargs: Any) -> LatentActionForCausalLM:  # type: ignore[override]
        """Load an export; ``dtype`` (or ``torch_dtype``) and ``device_map`` with one device are heeded.

        Raises:
            ValueError: no export there, or it is damaged.
        """
        folder = Path(pretrained_model_name_or_path)
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or "auto"
        model = cls.of(LatentActionLM.from_pretrained(folder, dtype=dtype).cast_modules())
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(str(folder))
        device = kwargs.get("device_map")
        return model.to(device) if isinstance(device, (str, int, torch.device)) and device != "auto" else model  # type: ignore[return-value]

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:  # type: ignore[override]
        """An export: base LM, codebook, merge module and policy, no inverse dynamics model."""
        folder = Path(save_directory)
        self.latent.save_pretrained(folder, bundle_base=True, inverse_dynamics=False)
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)

    def get_input_embeddings(self) -> torch.nn.Module:
        """The base LM's."""
        return self.latent.base.decoder.get_input_embeddings()

    def get_output_embeddings(self) -> torch.nn.Module:
        """The base LM's."""
        return self.latent.base.lm.get_output_embeddings()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """Log-probabilities [B, T, V] of the next token, codes summed out; the loss where ``labels`` [B, T] are not -100.

        Raises:
            ValueError: codes last for several tokens, so that what comes next depends on the code that was taken.
        """
        if self.config.span > 1:
            raise ValueError(
                f"codes of this model last for {self.config.span} tokens: there is no next-token distribution without one; use generate"
            )
        features = self.latent.features(input_ids, attention_mask)
        policy = self.latent.policy_logits(features, attention_mask).float().log_softmax(-1).flatten(0, 1)
        final = features.read("final").flatten(0, 1)
        parts = [
            torch.logsumexp(pi[..., None] + self.latent.world_logits_of_all(state).float().log_softmax(-1), 1)
            for state, pi in zip(final.split(POSITIONS), policy.split(POSITIONS), strict=True)
        ]
        logits = torch.cat(parts).view(*input_ids.shape, -1)
        loss = None
        if labels is not None:
            counted = labels[:, 1:] != IGNORED
            loss = token_nll(logits[:, :-1][counted], labels[:, 1:][counted]).mean()
        return CausalLMOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        codes: torch.Tensor | None = None,
        allowed_codes: Sequence[int] | None = None,
        seed: int | None = None,
        return_dict_in_generate: bool = False,
        **settings: Any,
    ) -> torch.Tensor | LatentGeneration:
        """As transformers' ``generate``: prompts [B, P] and new tokens, or ``LatentGeneration`` on request.

        Args:
            codes: to take at the first tokens, [T] or [B * num_return_sequences, T]; -1 leaves the choice to the policy.
            allowed_codes: the only ones to choose from.
            seed: makes sampling reproducible; else torch's global stream decides.

        Raises:
            ValueError: a setting that this model does not have (beams, penalties, processors), or one out of range.
        """
        prompts = input_ids if input_ids is not None else inputs
        if prompts is None:
            raise ValueError("generate needs input_ids")
        chosen = self._chosen(generation_config, settings)
        limit = chosen.max_new_tokens or (chosen.max_length or 0) - prompts.shape[1]
        if limit < 1:
            raise ValueError(
                f"max_length={chosen.max_length} leaves no room behind prompts of {prompts.shape[1]} tokens: set max_new_tokens"
            )
        repeats = chosen.num_return_sequences or 1
        found = self.latent.generate(
            prompts,
            attention_mask,
            max_new_tokens=limit,
            temperature=(chosen.temperature or 1.0) if chosen.do_sample else 0.0,
            top_k=chosen.top_k or None,
            stop_token=chosen.eos_token_id,
            repeats=repeats,
            seed=seed,
            allowed_actions=None if allowed_codes is None else self._mask(allowed_codes, prompts.device),
            forced_actions=codes,
        )
        longest = int(found.lengths.max())
        ended = torch.arange(longest, device=prompts.device) >= found.lengths[:, None]
        tokens = found.tokens[:, :longest].masked_fill(ended, chosen.pad_token_id or 0)
        sequences = torch.cat([prompts.repeat_interleave(repeats, 0), tokens], 1)
        if not return_dict_in_generate:
            return sequences
        return LatentGeneration(sequences=sequences, codes=found.actions[:, :longest], code_log_probs=found.action_logp[:, :longest])  # type: ignore[arg-type]

    def _chosen(self, given: GenerationConfig | None, settings: dict[str, Any]) -> GenerationConfig:
        """The settings of one call; those that would be ignored are refused."""
        chosen = copy.deepcopy(given or self.generation_config)
        foreign = chosen.update(**settings)
        foreign |= {name: value for name, value in chosen.to_diff_dict().items() if name not in (*KNOWN, *SILENT) and value is not None}
        if foreign:
            raise ValueError(
                f"generate does not know {', '.join(sorted(foreign))}: codes are sampled, so that only {', '.join(KNOWN)} apply"
            )
        return chosen

    def _mask(self, allowed: Sequence[int], device: torch.device) -> torch.Tensor:
        if wrong := [code for code in allowed if not 0 <= code < self.config.num_actions]:
            raise ValueError(f"allowed_codes names {wrong}: this codebook has the codes 0 to {self.config.num_actions - 1}")
        mask = torch.zeros(self.config.num_actions, dtype=torch.bool, device=device)
        mask[list(allowed)] = True
        return mask


def auto_config(latent: LatentActionLM) -> LatentActionAutoConfig:
    """What ``config.json`` says of a model."""
    return LatentActionAutoConfig(
        vocab_size=latent.base.lm.config.get_text_config().vocab_size,
        hidden_size=latent.base.width,
        num_actions=latent.config.num_actions,
        span=latent.config.span,
    )


def default_generation(lm: PreTrainedModel) -> GenerationConfig:
    """Special tokens of the base LM; how it samples *tokens* says nothing about codes."""
    known = lm.generation_config or lm.config
    return GenerationConfig(**{name: getattr(known, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")})


AutoConfig.register(LatentActionAutoConfig.model_type, LatentActionAutoConfig)
AutoModelForCausalLM.register(LatentActionAutoConfig, LatentActionForCausalLM)
