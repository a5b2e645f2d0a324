"""One row decoded with what it was decoded from: at each token the base's state, and what the policy wanted before
anything was decided for it. So what another code would have produced is read off the very state that the decoding went
through, not computed again.

Axes: T tokens, D width, N codes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from latent_control.decoding.generate import generate
from latent_control.decoding.guide import Guide, Watch
from latent_control.decoding.sampling_params import SamplingParams
from latent_control.distributions import action_log_probs
from latent_control.model import LatentActionLM


@dataclass(frozen=True, kw_only=True)
class Overheard(Guide):
    """A guide for one row that keeps the policy's logits [1, N] of each step as they were."""

    heard: list[torch.Tensor] = field(default_factory=list)

    def apply(self, logits: torch.Tensor, rows: Sequence[int], places: Sequence[int]) -> torch.Tensor:
        """As ``Guide.apply``."""
        self.heard.append(logits)
        return super().apply(logits, rows, places)


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A decoded row: ``Traced(tokens=(7, 2), codes=(3, 1), finish_reason="stop", states=[2, D], logits=[2, N],
    guided=[2, N])``."""

    tokens: tuple[int, ...]
    """T, the end token included"""
    codes: tuple[int, ...]
    """T; a code that lasts for several tokens stands at each of them"""
    finish_reason: str
    states: torch.Tensor
    """[T, D], the base's final state that each token was made from"""
    logits: torch.Tensor
    """[T, N], the policy's own"""
    guided: torch.Tensor
    """[T, N], -inf where a code might not be chosen"""

    def chances(self, place: int, *, temperature: float, top_k: int | None) -> torch.Tensor:
        """The policy's own probabilities [N] at ``place``."""
        return action_log_probs(self.logits[place], temperature=temperature, top_k=top_k).exp()


@torch.no_grad()
def generate_traced(
    model: LatentActionLM,
    prompt: Sequence[int],
    *,
    guide: Guide | None = None,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None = None,
    seed: int,
    stop_token: int | list[int] | None = None,
    watch: Watch | None = None,
) -> Traced:
    """``LatentActionLM.generate`` of one prompt (token ids), with its trace; ``seed`` is the row's own stream."""
    device, actions = model.codebook.device, model.config.num_actions
    if guide is None:
        guide = Guide(
            codes=torch.full((1, 1), -1, device=device), allowed=torch.ones(1, actions, dtype=torch.bool, device=device)
        )
    overheard = Overheard(codes=guide.codes, allowed=guide.allowed, barred=guide.barred)
    states: list[torch.Tensor] = []
    actor = model.actor()

    def emit(final: torch.Tensor | None, codes: torch.Tensor) -> torch.Tensor:
        assert final is not None and len(final) == 1
        states.append(final)
        return actor.emit(final, codes)

    out = generate(
        model.base,
        replace(actor, emit=emit),
        SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            row_seeds=[seed],
            stop_token=stop_token,
            guide=overheard,
            watch=watch,
        ),
        torch.tensor([list(prompt)], device=device),
    )
    length = int(out.lengths[0])
    assert len(states) == len(overheard.heard) == length, "every token is made from one state and one choice"
    logits = torch.cat(overheard.heard).float()
    guided = torch.cat([guide.apply(logits[t : t + 1], [0], [t]) for t in range(length)])
    return Traced(
        tokens=tuple(out.tokens[0, :length].tolist()),
        codes=tuple(out.actions[0, :length].tolist()),
        finish_reason=out.finish_reasons[0],
        states=torch.cat(states),
        logits=logits,
        guided=guided,
    )
