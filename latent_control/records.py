"""Typed records that cross the boundaries of the method. Axes: B rollouts, T tokens, D width, N codes, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch

from latent_control.notebook_views import coloured_tokens
from latent_control.text import decode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_state(reads: str, final: torch.Tensor | None, late: torch.Tensor | None) -> torch.Tensor | None:
    """Of the base's states at some positions [..., D] the one that ``reads`` names; "both": the final one and the late
    one side by side, [..., 2 D]. ``None`` where the base does not supply it."""
    if reads == "both":
        return None if final is None or late is None else torch.cat([final, late], -1)
    return late if reads == "late" else final


@dataclass(frozen=True, kw_only=True)
class Features:
    """What one pass of the base LM supplies.

    ``Features(final=torch.zeros(2, 5, 128), late=torch.zeros(2, 5, 128))``
    """

    final: torch.Tensor | None
    """[B, T, D], the base's last hidden state after its final norm; ``None`` when only ``late`` was asked for."""
    late: torch.Tensor | None
    """[B, T, D], the hidden state ``n`` blocks before the base's end; ``None`` when nothing reads it."""

    def read(self, reads: str) -> torch.Tensor:
        """The state a stack with ``reads`` ("final", "late" or "both") takes, [B, T, D or 2 D]."""
        state = read_state(reads, self.final, self.late)
        assert state is not None, f"features hold no {reads!r} state"
        return state

    def last(self) -> Features:
        """The same at the last position alone, [B, 1, D]."""
        return replace(
            self, **{name: None if (x := getattr(self, name)) is None else x[:, -1:] for name in ("final", "late")}
        )

    def detach(self) -> Features:
        """The same features outside the autograd graph."""
        detached = {name: None if (x := getattr(self, name)) is None else x.detach() for name in ("final", "late")}
        return replace(self, **detached)


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Right-padded token rows for the offline stages."""

    input_ids: torch.Tensor
    """[B, T] int64"""
    attention_mask: torch.Tensor
    """[B, T] int64, 1 on real tokens"""
    response_mask: torch.Tensor
    """[B, T] bool, True where the token was generated or belongs to the gold response (plain text: every real token)"""

    def to(self, device: torch.device | str) -> Self:
        """The batch on ``device``."""
        return type(self)(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def rows(self, start: int, stop: int) -> Self:
        """Rows ``start:stop``, trimmed to their longest one."""
        length = int(self.attention_mask[start:stop].sum(1).max())
        return type(self)(
            **{name: t[start:stop, :length] if t.ndim > 1 else t[start:stop] for name, t in vars(self).items()}
        )


@dataclass(frozen=True, kw_only=True)
class RolloutBatch(TokenBatch):
    """Stored rollouts, right padded: prompt and generated tokens; ``response_mask`` is True on the generated ones."""

    actions: torch.Tensor
    """[B, T] int64, each code at the place of the token it produced; 0 elsewhere"""
    advantages: torch.Tensor
    """[B] float32, reward minus baseline"""
    index: torch.Tensor
    """[B] int64, the rollout's number in its buffer, by which its features are kept"""


@dataclass(frozen=True, kw_only=True, repr=False)
class Generation:
    """What ``generate`` returns. Rows are right padded to ``max_new_tokens``.

    ``tokens[b, :lengths[b]]`` are row b's generated tokens, the end token included. In a notebook it shows its tokens
    on the colours of their codes; ``shown(tokenizer)`` shows texts in place of token numbers.
    """

    tokens: torch.Tensor
    """[B, T] int64, padded with the pad token"""
    actions: torch.Tensor
    """[B, T] int64, the code that produced each token (the token itself at token level); -1 after the end. A code that
    lasts for several tokens stands at each of them. Decoded by token: the code most responsible for the token (in a
    span: for its first one), which nobody sampled"""
    action_logp: torch.Tensor
    """[B, T] float32, log-probability of each action under the distribution it was sampled from (decoded by token:
    the policy's); 0 inside a span and after the end"""
    lengths: torch.Tensor
    """[B] int64"""
    finish_reasons: tuple[str, ...]
    """"stop" (end token) or "length", per row"""
    versions: torch.Tensor
    """[B, T] int64, version of the policy that chose each action: 0 throughout unless ``refresh`` was given; -1 after
    the end"""
    event_logp: torch.Tensor | None = None
    """[B, T] float32, log-probability of having chosen this code or one that emits the same token, when asked for
    (``aliases``)"""
    events: torch.Tensor | None = None
    """[B, T, ceil(N / 8)] uint8, which codes those are, eight to a byte"""
    support: torch.Tensor | None = None
    """[B, T, k] int64, the actions that each was sampled from, where ``top_k`` left some out"""
    features: tuple[torch.Tensor, ...] | None = None
    """Per row [P + length - 1, D]: the state the policy reads at each position that was fed, when asked for; [length,
    D], at those where an action was chosen, where it reads no other"""

    def rows(self) -> list[list[tuple[int, int, float]]]:
        """(token, code, log-probability of the code) of every generated token, row by row."""
        columns = (self.tokens.tolist(), self.actions.tolist(), self.action_logp.tolist())
        lengths = self.lengths.tolist()
        return [
            list(zip(*(column[:length] for column in row), strict=True))
            for *row, length in zip(*columns, lengths, strict=True)
        ]

    def shown(self, tokenizer: PreTrainedTokenizerBase) -> GenerationText:
        """The same with texts: plain when printed, coloured by code in a notebook."""
        rows = [[(str(tokenizer.decode([token])), code, logp) for token, code, logp in row] for row in self.rows()]
        return GenerationText(
            rows=rows,
            texts=[decode_text(tokenizer, [token for token, *_ in row]) for row in self.rows()],
            title=repr(self),
        )

    def __repr__(self) -> str:
        lengths, stopped = self.lengths.tolist(), sum(reason == "stop" for reason in self.finish_reasons)
        least, most = min(lengths, default=0), max(lengths, default=0)
        span = f"{most}" if least == most else f"{least} to {most}"
        return (
            f"Generation({len(lengths)} rows of {span} tokens, {stopped} stopped by themselves, "
            f"{len(lengths) - stopped} cut)"
        )

    def _repr_html_(self) -> str:
        rows = [[(str(token), code, logp) for token, code, logp in row] for row in self.rows()]
        return coloured_tokens(rows, repr(self))


@dataclass(frozen=True, kw_only=True, repr=False)
class GenerationText:
    """A generation in words. ``GenerationText(rows=[[("6", 3, -0.1), (" +", 17, -0.5)]], texts=["6 +"],
    title="...")``"""

    rows: list[list[tuple[str, int, float]]]
    """Per row (text of the token, code, log-probability of the code)."""
    texts: list[str]
    """Each row as one text."""
    title: str

    def __repr__(self) -> str:
        return "\n".join(
            [
                self.title,
                *(
                    f"{text!r}  codes {[code for _, code, _ in row]}"
                    for text, row in zip(self.texts, self.rows, strict=True)
                ),
            ]
        )

    def _repr_html_(self) -> str:
        return coloured_tokens(self.rows, self.title)
