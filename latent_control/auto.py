"""The model as ``transformers`` knows language models: ``AutoModelForCausalLM.from_pretrained(EXPORT).generate(...)``.

Importing ``latent_control`` registers it, so no code is taken from a checkpoint. Decoding is
``LatentActionLM.generate``: a code by the policy, its most likely token by the world model. What samples
(``do_sample``, ``temperature``, ``top_k``) samples codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import CausalLMOutput

from latent_control.auto_generation import (
    LatentGenerateOutput,
    decoding_of,
    greedy_defaults,
    new_token_limit,
    padded_output,
    settings_in_force,
    shown_to,
    string_watch,
)
from latent_control.config import LatentActionConfig
from latent_control.decoding.guide import Allowed, Codes
from latent_control.model import LatentActionLM, token_nll
from latent_control.records import Features
from latent_control.text import config_ends, name_ends, saved_ends

# Of the base's config, what tools ask a model's config for.
_SHOWN = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# What ``AutoModelForCausalLM`` passes along, which says nothing about a folder on disk.
_HUB = {
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "adapter_kwargs",
    "_from_auto",
}
# Of a position all codes' next-token logits are made at once, for this many positions at a time.
_POSITIONS = 64
_IGNORED = -100


class LatentControlConfig(PreTrainedConfig):
    """``config.json`` of an export: the shape of the new modules and the base LM's own config."""

    model_type = "latent_control"

    latent_actions: dict[str, Any] | None = None
    base_lm: dict[str, Any] | None = None

    @classmethod
    def of(cls, model: LatentActionLM) -> LatentControlConfig:
        """The config of a model."""
        lm = model.base.lm.config
        shown = {name: getattr(lm, name) for name in _SHOWN if hasattr(lm, name)}
        # a place on the exporting machine
        base = {name: value for name, value in lm.to_dict().items() if name != "_name_or_path"}
        return cls(
            latent_actions=dataclasses.asdict(model.config),
            base_lm=base,
            architectures=["LatentActionForCausalLM"],
            dtype=lm.dtype,
            **shown,
        )


class LatentActionForCausalLM(PreTrainedModel, GenerationMixin):
    """``LatentActionLM`` behind the interface of ``transformers``; ``latent`` is that model."""

    config_class = LatentControlConfig
    base_model_prefix = "latent"

    def __init__(self, config: LatentControlConfig, latent: LatentActionLM | None = None) -> None:
        super().__init__(config)
        if latent is None:
            settings = dict(config.base_lm or {})
            base = AutoConfig.for_model(settings.pop("model_type", "llama"), **settings)
            lm = AutoModelForCausalLM.from_config(base, trust_remote_code=False)
            latent = LatentActionLM(lm, LatentActionConfig(**config.latent_actions or {}), inverse_dynamics=False)
        self.latent = latent

    # -- loading and saving ------------------------------------------------------------------------------------------

    @classmethod
    def wrap(cls, latent: LatentActionLM) -> LatentActionForCausalLM:
        """A model for ``transformers``, without its inverse dynamics model; world model and policy as rollout workers
        host them."""
        model = cls(LatentControlConfig.of(latent.hosted()), latent)
        model.generation_config = greedy_defaults(latent.base.lm)
        return model.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *_: Any,
        base: str | Path | PreTrainedModel | None = None,
        dtype: str | torch.dtype = "auto",
        device_map: Any = None,
        trust_remote_code: bool = False,
        config: Any = None,
        torch_dtype: str | torch.dtype | None = None,
        **settings: Any,
    ) -> LatentActionForCausalLM:
        """Load what ``save_pretrained`` or ``latent-control export`` wrote.

        Args:
            base: where the base LM lies now, when it is not inside and moved since.
            device_map: one device for all of it.
            config: not needed; taken from the folder.

        Raises: ValueError: no such folder, nothing of ours in it, a base that is not there or another, or an argument
            that is not known.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            raise ValueError(
                f"{str(folder)!r} is not a folder on this machine; download the model there first, e.g. hf download "
                "REPO --local-dir X"
            )
        if unknown := {name for name, value in settings.items() if value is not None} - _HUB:
            raise ValueError(
                f"from_pretrained does not know {', '.join(sorted(unknown))}: it takes base, dtype, device_map, "
                "trust_remote_code"
            )
        latent = LatentActionLM.from_pretrained(
            folder,
            base=base,
            dtype=dtype if torch_dtype is None else torch_dtype,
            trust_remote_code=bool(trust_remote_code),
        )
        model = cls.wrap(latent)
        model.config.name_or_path = model.name_or_path = str(folder)
        if (folder / "generation_config.json").is_file():
            of_base = config_ends(model.generation_config)
            model.generation_config = GenerationConfig.from_pretrained(folder)
            name_ends(model.generation_config, [*of_base, *saved_ends(folder)])
        device = device_map.get("", None) if isinstance(device_map, dict) else device_map
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return model if device is None else model.to(device)

    def save_pretrained(self, save_directory: str | Path, *, bundle_base: bool = True, **_: Any) -> None:
        """Write a folder ``from_pretrained`` reads: safetensors and JSON; the base inside, or by reference with its
        hash."""
        folder = self.latent.save_pretrained(save_directory, bundle_base=bundle_base, inverse_dynamics=False)
        LatentControlConfig.of(self.latent).save_pretrained(folder)
        self.generation_config.save_pretrained(folder)

    # -- the interface of a language model ---------------------------------------------------------------------------

    def get_decoder(self) -> PreTrainedModel:
        """The base LM's blocks."""
        return self.latent.base.decoder

    def get_input_embeddings(self) -> torch.nn.Module:
        """The base LM's."""
        return self.latent.base.lm.get_input_embeddings()

    def get_output_embeddings(self) -> torch.nn.Module:
        """The base LM's head, which reads the merged state."""
        return self.latent.base.lm.get_output_embeddings()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        codes: torch.Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """Logits [B, T, V] of the next token under ``codes`` [B, T]; without them its log-probabilities, codes summed
        out: log sum_a pi(a) p(x | a). ``loss``: the mean over ``labels`` [B, T] that are not -100, shifted.

        Raises: ValueError: no ``codes``, where they last for several tokens, so that what comes next depends on the one
            that was taken.
        """
        features = self.latent.features(input_ids, attention_mask)
        logits = (
            marginal_log_probs(self.latent, features, attention_mask)
            if codes is None
            else self.latent.world_logits(features, codes)
        )
        loss = None
        if labels is not None:
            counted = labels[:, 1:] != _IGNORED
            loss = token_nll(logits[:, :-1][counted], labels[:, 1:][counted]).mean()
        return CausalLMOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        stopping_criteria: StoppingCriteriaList | Sequence[Callable[..., Any]] | None = None,
        streamer: Any = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        codes: Codes | None = None,
        allowed_codes: Allowed | None = None,
        return_codes: bool = False,
        seed: int | None = None,
        tokenizer: Any = None,
        **settings: Any,
    ) -> torch.Tensor | LatentGenerateOutput:
        """Prompts [B, P] with their continuations, [B * num_return_sequences, P + T], as ``transformers`` returns them.

        Greedy by default; ``do_sample=True`` samples codes by ``temperature`` and ``top_k``. A token is its code's most
        likely one; with ``decode="token"`` (an argument, or in the generation config) it is the most likely one, or one
        sampled by ``temperature``, of the mixture over the ``mixture_codes`` likeliest codes, and ``codes`` are those
        most responsible for the tokens.

        Args:
            stopping_criteria: called with all sequences [R, P + t] after every token, without scores.
            codes: codes forced from the first token on, for all rows or for each; the policy chooses the rest.
            allowed_codes: codes the policy may choose.
            return_codes: return a ``LatentGenerateOutput`` (as ``return_dict_in_generate`` does).
            seed: of the sampling; ``None`` draws one from torch's global stream.
            tokenizer: for ``stop_strings``; default: the one in the model's folder.

        Raises:
            ValueError: an argument that is not known here (beams, logits processors), or is out of range.
        """
        prompts = inputs if input_ids is None else input_ids
        if prompts is None:
            raise ValueError("generate needs input_ids [B, P]")
        wanted = settings_in_force(self.generation_config, generation_config, settings)
        criteria = StoppingCriteriaList(stopping_criteria or [])
        repeated = prompts.repeat_interleave(wanted.num_return_sequences or 1, 0)
        shown = shown_to(repeated, criteria, streamer, wanted.pad_token_id or 0)
        out = self.latent.generate(
            prompts,
            attention_mask,
            max_new_tokens=new_token_limit(wanted, prompts.shape[1]),
            temperature=0.0 if not wanted.do_sample else 1.0 if wanted.temperature is None else wanted.temperature,
            top_k=wanted.top_k or None if wanted.do_sample else None,
            seed=seed,
            stop_token=-1 if wanted.eos_token_id is None else wanted.eos_token_id,
            repeats=wanted.num_return_sequences or 1,
            codes=codes,
            allowed_codes=allowed_codes,
            **decoding_of(wanted),
            watch=string_watch(wanted.stop_strings, tokenizer, self.name_or_path, shown),
        )
        if streamer is not None:
            streamer.end()
        found = padded_output(repeated, out, wanted.pad_token_id)
        return found if return_codes or wanted.return_dict_in_generate else cast("torch.Tensor", found.sequences)


def marginal_log_probs(latent: LatentActionLM, features: Features, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Log-probabilities [B, T, V] of the next token, codes summed out; ``ValueError`` where codes last for several."""
    if (span := latent.config.span) > 1:
        raise ValueError(
            f"codes of this model last for {span} tokens: there is no next-token distribution without codes; give codes"
        )
    policy = latent.policy_logits(features, attention_mask).float().log_softmax(-1)
    final = features.read("final")
    parts = [
        torch.logsumexp(pi[..., None] + latent.world_logits_of_all(state).float().log_softmax(-1), 1)
        for state, pi in zip(final.flatten(0, 1).split(_POSITIONS), policy.flatten(0, 1).split(_POSITIONS), strict=True)
    ]
    return torch.cat(parts).view(*final.shape[:2], -1)


AutoConfig.register(LatentControlConfig.model_type, LatentControlConfig, exist_ok=True)
AutoModelForCausalLM.register(LatentControlConfig, LatentActionForCausalLM, exist_ok=True)
