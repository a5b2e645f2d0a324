"""Cached decoding: the policy picks a code, the language world model emits that code's most likely token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import Cache, PreTrainedModel

from latent_control.base import BaseLM
from latent_control.distributions import action_log_probs, rollout_seed, sample_actions, uniform_streams
from latent_control.records import Features, Generation


@dataclass(frozen=True, kw_only=True)
class Actor:
    """How actions are chosen and become tokens; three of these exist: latent policy, token-level policy, base LM."""

    logits: Callable[[Features, torch.Tensor, torch.Tensor, Cache], torch.Tensor]
    """(features of the new positions, attention mask [B, so far], positions [B, new], the actor's own cache) -> [B, actions]
    for the last position."""
    emit: Callable[[Features, torch.Tensor], torch.Tensor]
    """(features, actions [B]) -> tokens [B]"""
    new_cache: Callable[[], Cache]
    state: Callable[[Features], torch.Tensor]
    """What the learner needs of the features, [B, new, D]."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of one call."""

    temperature: float
    top_k: int | None
    stop_tokens: tuple[int, ...]
    pad_token: int
    keep_features: bool


class Rows:
    """The rows being decoded: shared prefill, growing caches, finished rows squeezed out."""

    # Squeezing copies the caches, so it waits until this share of the rows is finished.
    SQUEEZE_SHARE = 0.25

    def __init__(
        self,
        base: BaseLM,
        actor: Actor,
        sampling: Sampling,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        limits: torch.Tensor,
        seeds: Sequence[int],
        repeats: int,
    ) -> None:
        self.base, self.actor, self.sampling = base, actor, sampling
        rows, longest = len(limits), int(limits.max())
        device = input_ids.device
        self.limits = limits
        self.uniforms = uniform_streams(seeds, longest).to(device)
        self.tokens = torch.full((rows, longest), sampling.pad_token, dtype=torch.long, device=device)
        self.actions = torch.full((rows, longest), -1, dtype=torch.long, device=device)
        self.logp = torch.zeros(rows, longest, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.stopped = torch.zeros(rows, dtype=torch.bool, device=device)
        self.live = torch.arange(rows, device=device)  # numbers of the rows still in the caches
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)  # among the live
        self.caches = base.new_cache(), actor.new_cache()
        self.states: list[tuple[torch.Tensor, torch.Tensor]] = []  # (rows, [rows, new, D])
        ones = torch.ones(rows, longest, dtype=attention_mask.dtype, device=device)
        self.mask = torch.cat([attention_mask.repeat_interleave(repeats, 0), ones], 1)
        self.prompt_lengths = attention_mask.sum(1).repeat_interleave(repeats)
        self._prefill(input_ids, attention_mask, repeats)

    def _prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, repeats: int) -> None:
        """One pass over the prompts; the rollouts of a prompt share it."""
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        features = self.base.features(input_ids, attention_mask, self.caches[0], positions)
        logits = self.actor.logits(features, attention_mask, positions, self.caches[1])
        if self.sampling.keep_features:
            self._keep(self.actor.state(features).repeat_interleave(repeats, 0))
        last = Features(**{name: None if x is None else x[:, -1:].repeat_interleave(repeats, 0) for name, x in vars(features).items()})
        for cache in self.caches:
            cache.batch_repeat_interleave(repeats)
        self.width = input_ids.shape[1]
        self.position = self.prompt_lengths.clone()
        self._choose(last, logits.repeat_interleave(repeats, 0), 0)

    def _keep(self, states: torch.Tensor) -> None:
        self.states.append((self.live, states))

    def _choose(self, features: Features, logits: torch.Tensor, step: int) -> None:
        """Pick an action and a token for each live row at generated position ``step``."""
        log_probs = action_log_probs(logits, temperature=self.sampling.temperature, top_k=self.sampling.top_k)
        greedy = self.sampling.temperature == 0
        actions = logits.argmax(-1) if greedy else sample_actions(log_probs, self.uniforms[self.live, step])
        tokens = self.actor.emit(features, actions)
        rows = self.live[~self.finished]
        fresh = ~self.finished
        self.actions[rows, step], self.tokens[rows, step] = actions[fresh], tokens[fresh]
        self.logp[rows, step] = log_probs.gather(-1, actions[:, None])[:, 0][fresh]
        self.lengths[rows] = step + 1
        if self.sampling.stop_tokens:
            self.stopped[rows] = torch.isin(tokens[fresh], tokens.new_tensor(self.sampling.stop_tokens))
        self.next_tokens = tokens
        self.finished = self.stopped[self.live] | (self.limits[self.live] <= step + 1)

    def _squeeze(self) -> None:
        """Take finished rows out of the caches."""
        keep = (~self.finished).nonzero()[:, 0]
        for cache in self.caches:
            if cache.get_seq_length():
                cache.batch_select_indices(keep)
        self.live, self.mask, self.position = self.live[keep], self.mask[keep], self.position[keep]
        self.next_tokens, self.finished = self.next_tokens[keep], self.finished[keep]

    def run(self) -> None:
        """Decode until every row has finished."""
        for step in range(1, self.tokens.shape[1]):
            share = float(self.finished.float().mean())
            if share == 1.0:
                return
            if share >= self.SQUEEZE_SHARE:
                self._squeeze()
            mask, positions = self.mask[:, : self.width + step], self.position[:, None]
            features = self.base.features(self.next_tokens[:, None], mask, self.caches[0], positions)
            logits = self.actor.logits(features, mask, positions, self.caches[1])
            if self.sampling.keep_features:
                self._keep(self.actor.state(features))
            self.position = self.position + 1
            self._choose(features, logits, step)

    def features(self) -> tuple[torch.Tensor, ...]:
        """Per row, the kept states of its prompt and of every generated token that was fed, [P + length - 1, D]."""
        prompts = self.states[0][1]
        steps = prompts.new_zeros(len(self.limits), max(len(self.states) - 1, 0), prompts.shape[-1])
        for index, (rows, states) in enumerate(self.states[1:]):
            steps[rows, index] = states[:, 0]
        prompt_length, length = self.prompt_lengths.tolist(), self.lengths.tolist()
        return tuple(
            torch.cat([prompts[row, prompts.shape[1] - p :], steps[row, : n - 1]])
            for row, (p, n) in enumerate(zip(prompt_length, length, strict=True))
        )


def left_pad(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, pad_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same rows with all padding moved to the left and common padding cut off."""
    if attention_mask is None:
        return input_ids, torch.ones_like(input_ids)
    if bool((attention_mask.sum(1) == 0).any()):
        raise ValueError("a row of attention_mask is all zero: every prompt needs at least one token")
    order = attention_mask.bool().int().argsort(dim=1, stable=True)
    ids, mask = input_ids.gather(1, order), attention_mask.gather(1, order).long()
    width = int(mask.sum(1).max())
    return ids[:, -width:].masked_fill(mask[:, -width:] == 0, pad_token), mask[:, -width:]


@torch.no_grad()
def decode(
    base: BaseLM,
    actor: Actor,
    sampling: Sampling,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    limits: torch.Tensor,
    seeds: Sequence[int],
    repeats: int,
    batch_size: int,
) -> Generation:
    """Decode ``repeats`` rollouts of each prompt [B, P] (left padded), at most ``batch_size`` rows at once.

    ``limits`` [B * repeats] bounds each row's new tokens; ``seeds`` name each row's random stream.
    """
    if batch_size < repeats:  # too few at once for a prompt's rollouts to share its prefill
        input_ids, attention_mask, repeats = input_ids.repeat_interleave(repeats, 0), attention_mask.repeat_interleave(repeats, 0), 1
    prompts_at_once = batch_size // repeats
    parts: list[Rows] = []
    for start in range(0, len(input_ids), prompts_at_once):
        prompts = slice(start, start + prompts_at_once)
        rows = slice(start * repeats, (start + prompts_at_once) * repeats)
        ids, mask = left_pad(input_ids[prompts], attention_mask[prompts], sampling.pad_token)
        part = Rows(base, actor, sampling, ids, mask, limits[rows], seeds[rows], repeats)
        part.run()
        parts.append(part)
    longest = int(limits.max())

    def joined(name: str, fill: float) -> torch.Tensor:
        return torch.cat([torch.nn.functional.pad(t := getattr(part, name), (0, longest - t.shape[1]), value=fill) for part in parts])

    return Generation(
        tokens=joined("tokens", sampling.pad_token),
        actions=joined("actions", -1),
        action_logp=joined("logp", 0.0),
        lengths=torch.cat([part.lengths for part in parts]),
        finish_reasons=tuple("stop" if s else "length" for part in parts for s in part.stopped.tolist()),
        versions=torch.where(joined("actions", -1) < 0, -1, 0),
        features=tuple(f for part in parts for f in part.features()) if sampling.keep_features else None,
    )


def row_limits(max_new_tokens: int | Sequence[int], rows: int, device: torch.device) -> torch.Tensor:
    """[rows] limits from one number or one per row."""
    limits = torch.as_tensor(max_new_tokens, device=device).reshape(-1)
    limits = limits.expand(rows) if len(limits) == 1 else limits
    if len(limits) != rows or rows == 0 or int(limits.min()) < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens!r}: need one positive number, or one for each of the {rows} rows")
    return limits


def special_tokens(lm: PreTrainedModel, stop_token: int | None) -> tuple[tuple[int, ...], int]:
    """(end tokens, pad token) of a base LM; chat models have several. ``stop_token`` -1 switches them off."""
    config = lm.generation_config or lm.config
    ends = config.eos_token_id if stop_token is None else stop_token
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    return tuple(end for end in ends if end >= 0), pad


def generate(
    base: BaseLM,
    actor: Actor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    max_new_tokens: int | Sequence[int],
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    stop_token: int | None = None,
    repeats: int = 1,
    row_seeds: Sequence[int] | None = None,
    return_features: bool = False,
    refresh: Callable[[], int] | None = None,
) -> Generation:
    """``LatentActionLM.generate`` for any actor; see there for the arguments.

    ``refresh`` is asked before every step for the policy's version; it may have changed the policy's weights in place.
    """
    rows = len(input_ids) * repeats
    limits = row_limits(max_new_tokens, rows, input_ids.device)
    if temperature < 0 or (top_k is not None and top_k < 1) or (batch_size is not None and batch_size < 1):
        raise ValueError(
            f"temperature={temperature}, top_k={top_k}, batch_size={batch_size}: need temperature >= 0, top_k >= 1, batch_size >= 1"
        )
    if row_seeds is None:
        start = int(torch.randint(2**31, ())) if seed is None else seed
        row_seeds = [rollout_seed(start, row) for row in range(rows)]
    if len(row_seeds) != rows:
        raise ValueError(f"{len(row_seeds)} row_seeds given: need one for each of the {rows} rows")
    stops, pad = special_tokens(base.lm, stop_token)
    sampling = Sampling(temperature=temperature, top_k=top_k, stop_tokens=stops, pad_token=pad, keep_features=return_features)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return decode(base, actor, sampling, input_ids, mask, limits=limits, seeds=row_seeds, repeats=repeats, batch_size=batch_size or rows)
