"""The model as ``transformers`` knows language models: ``AutoModelForCausalLM.from_pretrained(EXPORT).generate(...)``.

Importing ``latent_control`` registers it, so no code is taken from a checkpoint. Decoding is
``LatentActionLM.generate``: a code by the policy, its most likely token by the world model. What samples
(``do_sample``, ``temperature``, ``top_k``) samples codes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from transformers.utils import ModelOutput

from latent_control.config import LatentActionConfig
from latent_control.decoding.guide import Allowed, Codes, Watch
from latent_control.model import LatentActionLM, token_nll
from latent_control.records import Features, Generation

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
# Settings of ``generate`` that are honoured; what else a caller sets is refused, not ignored.
_HONOURED = {
    "max_new_tokens",
    "max_length",
    "do_sample",
    "temperature",
    "top_k",
    "num_return_sequences",
    "return_dict_in_generate",
}
_HONOURED |= {"eos_token_id", "pad_token_id", "bos_token_id", "stop_strings", "use_cache"}
# Of a position all codes' next-token logits are made at once: so many positions at a time.
_POSITIONS = 64
_IGNORED = -100
_WITHOUT_EFFECT: dict[str, Any] = {"num_beams": 1, "top_p": 1.0, "repetition_penalty": 1.0}


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


@dataclass
class LatentGenerateOutput(ModelOutput):
    """What ``generate`` returns when codes are asked for. Axes: R rows, P prompt, T new tokens."""

    sequences: torch.Tensor | None = None
    """[R, P + T]: prompts and new tokens"""
    codes: torch.Tensor | None = None
    """[R, T], the code that produced each new token; -1 after the end"""
    code_logp: torch.Tensor | None = None
    """[R, T], log-probability of each code where the policy chose it; 0 where it was forced, inside a span and after
    the end"""
    lengths: torch.Tensor | None = None
    """[R], new tokens"""


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
        latent.inverse_dynamics = None
        latent.cast_modules().policy.float()
        model = cls(LatentControlConfig.of(latent), latent)
        model.generation_config = greedy_defaults(latent)
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
                f"{str(folder)!r} is no folder on this machine; download the model there first, e.g. hf download REPO "
                "--local-dir X"
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
            model.generation_config = GenerationConfig.from_pretrained(folder)
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
            self._marginal(features, attention_mask) if codes is None else self.latent.world_logits(features, codes)
        )
        loss = None
        if labels is not None:
            counted = labels[:, 1:] != _IGNORED
            loss = token_nll(logits[:, :-1][counted], labels[:, 1:][counted]).mean()
        return CausalLMOutput(loss=loss, logits=logits)

    def _marginal(self, features: Features, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """[B, T, V] log-probabilities."""
        if (span := self.latent.config.span) > 1:
            raise ValueError(
                f"codes of this model last for {span} tokens: there is no next-token distribution "
                "without codes; give codes"
            )
        policy = self.latent.policy_logits(features, attention_mask).float().log_softmax(-1)
        final = features.read("final")
        parts = [
            torch.logsumexp(pi[..., None] + self.latent.world_logits_of_all(state).float().log_softmax(-1), 1)
            for state, pi in zip(
                final.flatten(0, 1).split(_POSITIONS), policy.flatten(0, 1).split(_POSITIONS), strict=True
            )
        ]
        return torch.cat(parts).view(*final.shape[:2], -1)

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

        Greedy by default; ``do_sample=True`` samples codes by ``temperature`` and ``top_k``. A token is always its
        code's most likely one.

        Args:
            stopping_criteria: called with all sequences [R, P + t] after every token, without scores.
            codes: codes forced from the first token on, for all rows or for each; the policy chooses the rest.
            allowed_codes: codes the policy may choose.
            return_codes: return a ``LatentGenerateOutput`` (as ``return_dict_in_generate`` does).
            seed: of the sampling; ``None`` draws one from torch's global stream.
            tokenizer: for ``stop_strings``.

        Raises:
            ValueError: an argument that is not known here (beams, logits processors), or is out of range.
        """
        prompts = inputs if input_ids is None else input_ids
        if prompts is None:
            raise ValueError("generate needs input_ids [B, P]")
        wanted = self._settings(generation_config, settings)
        criteria = StoppingCriteriaList(stopping_criteria or [])
        if wanted.stop_strings is not None:
            criteria.append(_stop_strings(wanted.stop_strings, tokenizer, prompts.shape[1]))
        repeated = prompts.repeat_interleave(wanted.num_return_sequences or 1, 0)
        out = self.latent.generate(
            prompts,
            attention_mask,
            max_new_tokens=_limit(wanted, prompts.shape[1]),
            temperature=0.0 if not wanted.do_sample else 1.0 if wanted.temperature is None else wanted.temperature,
            top_k=wanted.top_k or None if wanted.do_sample else None,
            seed=seed,
            stop_token=-1 if wanted.eos_token_id is None else wanted.eos_token_id,
            repeats=wanted.num_return_sequences or 1,
            codes=codes,
            allowed_codes=allowed_codes,
            watch=_watch(repeated, criteria, streamer, wanted.pad_token_id or 0),
        )
        if streamer is not None:
            streamer.end()
        found = _output(repeated, out, wanted.pad_token_id)
        return found if return_codes or wanted.return_dict_in_generate else cast("torch.Tensor", found.sequences)

    def _settings(self, given: GenerationConfig | None, settings: dict[str, Any]) -> GenerationConfig:
        """The generation config in force; ``ValueError`` for what would be ignored."""
        given = given or self.generation_config
        asked = {name: value for name, value in settings.items() if value is not None}
        asked |= {name: getattr(given, name, None) for name in _WITHOUT_EFFECT if name not in asked}
        refused = {
            name: value
            for name, value in asked.items()
            if name not in _HONOURED and value is not None and value != _WITHOUT_EFFECT.get(name)
        }
        if refused:
            named = ", ".join(f"{name}={value!r:.40}" for name, value in sorted(refused.items()))
            raise ValueError(
                f"generate does not know {named}: codes are chosen greedily, or sampled by temperature and top_k"
            )
        wanted = copy.deepcopy(given)
        for name in ("eos_token_id", "pad_token_id"):
            if getattr(wanted, name) is None:
                setattr(wanted, name, getattr(self.generation_config, name))
        for name, value in asked.items():
            setattr(wanted, name, value)
        return wanted


def greedy_defaults(latent: LatentActionLM, max_new_tokens: int | None = None) -> GenerationConfig:
    """Greedy decoding with the base's special tokens; how the base itself likes to be sampled says nothing about
    codes."""
    of_base = latent.base.lm.generation_config or latent.base.lm.config
    tokens = {name: getattr(of_base, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, **tokens)


def _limit(wanted: GenerationConfig, prompt: int) -> int:
    """How many new tokens."""
    if wanted.max_new_tokens is not None:
        return int(wanted.max_new_tokens)
    if wanted.max_length is None:
        raise ValueError("generate needs max_new_tokens: neither the call nor generation_config.json says how many")
    if wanted.max_length <= prompt:
        raise ValueError(
            f"max_length={wanted.max_length} leaves no room after prompts of {prompt} tokens; give max_new_tokens"
        )
    return int(wanted.max_length) - prompt


def _stop_strings(strings: str | list[str], tokenizer: Any, prompt: int) -> Callable[..., torch.Tensor]:
    """Ends a row whose new text holds one of ``strings``. Reads text, as transformers' own criterion fails on
    vocabularies of words."""
    if tokenizer is None:
        raise ValueError("stop_strings are looked for in text: give tokenizer, too")
    wanted = [strings] if isinstance(strings, str) else strings

    def ended(sequences: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
        texts = tokenizer.batch_decode(sequences[:, prompt:])
        return torch.tensor([any(string in text for string in wanted) for text in texts], device=sequences.device)

    return ended


def _output(prompts: torch.Tensor, out: Generation, pad: int | None) -> LatentGenerateOutput:
    """Prompts [R, P] with what was generated for them, cut to the longest."""
    longest = int(out.lengths.max())
    tokens, codes = out.tokens[:, :longest], out.actions[:, :longest]
    if pad is not None:
        tokens = tokens.masked_fill(codes < 0, pad)
    return LatentGenerateOutput(
        sequences=torch.cat([prompts, tokens], dim=1),
        codes=codes,
        code_logp=out.action_logp[:, :longest],
        lengths=out.lengths,
    )


def _watch(prompts: torch.Tensor, criteria: StoppingCriteriaList, streamer: Any, pad: int) -> Watch | None:
    """Shows every step to stopping criteria and a streamer. All rows start together, so they are equally long."""
    if not criteria and streamer is None:
        return None
    sequences = prompts
    if streamer is not None:
        if len(prompts) > 1:
            raise ValueError(f"a streamer shows one sequence, not {len(prompts)}")
        streamer.put(prompts.cpu())

    def watch(rows: list[int], tokens: list[int], _: list[int]) -> Sequence[bool]:
        nonlocal sequences
        column = sequences.new_full((len(sequences), 1), pad)
        column[rows, 0] = torch.tensor(tokens, device=column.device)
        sequences = torch.cat([sequences, column], dim=1)
        if streamer is not None:
            streamer.put(column[0].cpu())
        if not criteria:
            return [False] * len(rows)
        ended = criteria(sequences, None)
        return [bool(ended[row]) for row in rows]

    return watch


AutoConfig.register(LatentControlConfig.model_type, LatentControlConfig, exist_ok=True)
AutoModelForCausalLM.register(LatentControlConfig, LatentActionForCausalLM, exist_ok=True)
