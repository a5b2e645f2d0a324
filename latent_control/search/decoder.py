"""Decoding chunks from any nodes of any trees in one batch, on caches whose prefix is never computed again.

A row's caches are put together from the segments of its path: a copy in memory, no forward pass. Rows end at the same
column (``slots``), so paths of different length share a batch. Every row draws from its own random stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from latent_control.base_lm import BaseLM
from latent_control.decoder_stack import position_ids
from latent_control.decoding.action_decoder import ActionDecoder
from latent_control.decoding.lean_blocks import lean_blocks
from latent_control.decoding.slot_memory import SlotLayer, SlotMemory
from latent_control.distributions import action_log_probs, sample_actions, uniform_streams
from latent_control.records import read_state
from latent_control.search.q_head import QHead, best_supported, supported
from latent_control.search.segments import Layers, Path, Segment, width

# Rows that have finished are computed along until they are this share.
SQUEEZE_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class Job:
    """Chunks asked of one node: one per seed."""

    path: Path
    seeds: Sequence[int]
    room: int
    """Tokens a response may still have"""


@dataclass(kw_only=True)
class SearchRows:
    """A batch in the making; everything is [R] or starts with R, rows in the order of ``numbers``."""

    numbers: list[int]
    """Which of the rows asked for each one is"""
    memory: SlotMemory
    base_cache: Cache
    policy_cache: Cache | None
    seen: torch.Tensor
    """[R, columns] bool"""
    positions: torch.Tensor
    """Of the next token"""
    logits: torch.Tensor
    final: torch.Tensor | None
    state: torch.Tensor
    """What the policy reads"""
    uniforms: torch.Tensor
    """[R, length]"""
    held: torch.Tensor
    """The code of the span each row is in"""


class ChunkDecoder:
    """Extends paths by chunks of a policy's codes. Exact: the same tokens and log-probabilities as decoding without a
    tree.

    Args:
        temperature, top_k: of the sampler; as in ``generate``.
        stop_tokens: what ends a response.
        ends: whether the tokens of a response so far end it, too (``rollout.stop``).
        max_rows: rows decoded at once.
        q: gives each chunk Q of its last code and each node its value; needs the latent level.
    """

    def __init__(
        self,
        base: BaseLM,
        actor: ActionDecoder,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        stop_tokens: Sequence[int] = (),
        ends: Callable[[Sequence[int]], bool] | None = None,
        max_rows: int = 256,
        q: QHead | None = None,
    ) -> None:
        self.base, self.actor, self.q = base, actor, q
        self.temperature, self.top_k = temperature, top_k
        self.stop_tokens, self.ends, self.max_rows = frozenset(stop_tokens), ends, max_rows
        self.lean_base = lean_blocks(base.decoder)
        self.lean_policy = None if actor.stack is None else lean_blocks(actor.stack.decoder)
        self.generated = 0
        """Tokens so far, the end tokens included, prompts not."""

    # -- prompts -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[Segment]:
        """A segment for each prompt."""
        parts = (prompts[first : first + self.max_rows] for first in range(0, len(prompts), self.max_rows))
        return [segment for part in parts for segment in self._prefill(part)]

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> list[Segment]:
        widest, device = max(map(len, prompts)), self.base.lm.device
        ids = torch.tensor([[0] * (widest - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (widest - len(p)) + [1] * len(p) for p in prompts], device=device)
        base_cache, policy_cache, positions = self.base.new_cache(), None, position_ids(mask)
        features = self.base.features(ids, mask, base_cache, positions)
        hidden = states = features.read(self.actor.reads)
        if self.actor.stack is not None:
            policy_cache = self.actor.stack.new_cache()
            hidden = self.actor.stack.hidden(hidden, mask, policy_cache, positions)
        logits = self.actor.head(hidden[:, -1])
        return [
            Segment(
                tokens=tuple(prompt),
                actions=(),
                action_logp=(),
                finished=False,
                stopped=False,
                base=_columns(base_cache, row, len(prompt)),
                policy=() if policy_cache is None else _columns(policy_cache, row, len(prompt)),
                logits=logits[row],
                final=None if features.final is None else features.final[row, -1],
                state=states[row, -1],
            )
            for row, prompt in enumerate(prompts)
        ]

    # -- chunks ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def extend(
        self,
        jobs: Sequence[Job],
        length: int,
        *,
        keep: bool = True,
        greedy: bool = False,
        q_temperature: float | None = None,
    ) -> list[list[Segment]]:
        """Chunks of ``length`` tokens for every seed of every job, shorter where a response ends.

        Args:
            keep: store what further chunks need; without, the chunks must be the last ones.
            greedy: the most likely code each time.
            q_temperature: sample codes from pi(a) exp(Q(h, a) / q_temperature) instead of pi(a).

        Raises:
            ValueError: a chunk would end inside a span.
        """
        if length % self.actor.span and keep:
            raise ValueError(
                f"chunks of {length} tokens would end inside a code, which lasts for {self.actor.span}: choose a "
                "multiple of it"
            )
        places = [(job, seed) for job in jobs for seed in job.seeds]
        found: list[Segment] = []
        for first in range(0, len(places), self.max_rows):
            part = places[first : first + self.max_rows]
            found += _Chunks(self, [job for job, _ in part], length, keep, greedy, q_temperature).run(
                [seed for _, seed in part]
            )
        self.generated += sum(len(segment.tokens) for segment in found)
        chunks = iter(found)
        return [[next(chunks) for _ in job.seeds] for job in jobs]

    def log_probs(self, logits: torch.Tensor, state: torch.Tensor | None, q_temperature: float | None) -> torch.Tensor:
        """What codes are sampled from, [R, N]; a code outside of the top k stays outside, whatever its Q."""
        log_probs = action_log_probs(logits, temperature=self.temperature, top_k=self.top_k)
        if q_temperature is None:
            return log_probs
        assert self.q is not None and state is not None
        return torch.log_softmax(log_probs + self.q(state) / q_temperature, -1)

    def value(self, segment: Segment) -> float:
        """max_a Q(h, a) at a segment's end, of codes the policy may take, within [0, 1]."""
        assert self.q is not None and segment.state is not None and segment.logits is not None
        best = best_supported(self.q(segment.state), supported(segment.logits, self.q.shape.support))
        return float(best.clamp(0, 1))

    def assemble(self, paths: Sequence[Path], length: int) -> SearchRows:
        """Rows whose caches hold their paths, with columns for ``length`` more tokens."""
        widths = [width(path) for path in paths]
        widest, count = max(widths), len(paths)
        memory = SlotMemory(count, widest)
        memory.reserve(before=widest, after=length)
        memory.rows, memory.start = count, memory.end - widest
        ends = [path[-1] for path in paths]
        logits = torch.stack([end.logits for end in ends if end.logits is not None])
        seen = torch.zeros(count, memory.capacity, dtype=torch.bool, device=logits.device)
        for row, columns in enumerate(widths):
            seen[row, memory.end - columns : memory.end] = True
        return SearchRows(
            numbers=list(range(count)),
            memory=memory,
            base_cache=_filled(memory, [[segment.base for segment in path] for path in paths]),
            policy_cache=None
            if self.actor.stack is None
            else _filled(memory, [[segment.policy for segment in path] for path in paths]),
            seen=seen,
            positions=torch.tensor(widths, device=logits.device),
            logits=logits,
            final=None if ends[0].final is None else torch.stack([end.final for end in ends if end.final is not None]),
            state=torch.stack([end.state for end in ends if end.state is not None]),
            uniforms=torch.empty(count, 0),
            held=torch.zeros(count, dtype=torch.long, device=logits.device),
        )

    def feed(self, rows: SearchRows, tokens: torch.Tensor, live: Sequence[int]) -> None:
        """One more token per row [R]: its place in the caches, and what base and policy say after it.

        ``live``: places of the rows that go on; a finished one may stand at the last position there is.
        """
        memory, stack = rows.memory, self.actor.stack
        rows.seen[:, memory.end] = True
        seen = rows.seen[:, memory.start : memory.end + 1]
        if self.lean_base is not None:
            x = self.base.decoder.get_input_embeddings()(tokens)
            place = self.lean_base.place(rows.positions, seen, x)
            final, late = self.lean_base.step(x, place, rows.base_cache, self.base.late_blocks)
        else:
            place = None
            features = self.base.features(tokens[:, None], seen.long(), rows.base_cache, rows.positions[:, None])
            final, late = (None if x is None else x[:, -1] for x in (features.final, features.late))
        hidden = read_state(self.actor.reads, final, late)
        assert hidden is not None, f"the base supplies no {self.actor.reads!r} state"
        rows.state = hidden
        if stack is not None and place is not None and self.lean_policy is not None:
            assert rows.policy_cache is not None
            stepped, _ = self.lean_policy.step(hidden.to(stack.head.weight.dtype), place, rows.policy_cache)
            assert stepped is not None
            hidden = stepped
        elif stack is not None:
            hidden = stack.hidden(hidden[:, None], seen.long(), rows.policy_cache, rows.positions[:, None])[:, -1]
        rows.logits, rows.final = self.actor.head(hidden), final
        rows.positions[live] += 1
        memory.end += 1


class _Chunks:
    """One batch of ``ChunkDecoder.extend``."""

    def __init__(
        self,
        decoder: ChunkDecoder,
        jobs: Sequence[Job],
        length: int,
        keep: bool,
        greedy: bool,
        q_temperature: float | None,
    ) -> None:
        self.decoder, self.jobs, self.keep, self.greedy, self.q_temperature = decoder, jobs, keep, greedy, q_temperature
        self.lengths = [min(length, job.room) for job in jobs]
        self.length = max(self.lengths)
        self.rows = decoder.assemble([job.path for job in jobs], self.length)
        self.start = self.rows.memory.end
        # tokens, actions, log-probabilities, Q
        self.chosen: list[list[tuple[int, int, float, float]]] = [[] for _ in jobs]
        self.done: dict[int, Segment] = {}

    def run(self, seeds: Sequence[int]) -> list[Segment]:
        """The chunk of each job, in order."""
        self.rows.uniforms = uniform_streams(seeds, self.length).to(self.rows.logits.device)
        for step in range(self.length):
            tokens = self._choose(step)
            live = [place for place, number in enumerate(self.rows.numbers) if number not in self.done]
            if not live:
                break
            tokens = self._squeeze(live, tokens)
            if self.keep or step + 1 < self.length:
                self.decoder.feed(
                    self.rows, tokens, [p for p, number in enumerate(self.rows.numbers) if number not in self.done]
                )
        if self.keep:
            self._keep()
        return [self.done[number] for number in range(len(self.jobs))]

    def _choose(self, step: int) -> torch.Tensor:
        """A code and a token for every row; rows whose response ends are done."""
        decoder, rows = self.decoder, self.rows
        log_probs = decoder.log_probs(rows.logits, rows.state, self.q_temperature)
        first = step % decoder.actor.span == 0
        if first:
            rows.held = log_probs.argmax(-1) if self.greedy else sample_actions(log_probs, rows.uniforms[:, step])
        taken = rows.held[:, None]
        logp = log_probs.gather(-1, taken)[:, 0] if first else torch.zeros(len(taken))
        q = torch.zeros(len(taken)) if decoder.q is None else decoder.q(rows.state).gather(-1, taken)[:, 0]
        tokens = decoder.actor.emit(rows.final, rows.held)
        for number, *one in zip(
            rows.numbers, tokens.tolist(), rows.held.tolist(), logp.tolist(), q.tolist(), strict=True
        ):
            if number not in self.done:
                self.chosen[number].append((one[0], one[1], one[2], one[3]))
                stopped = one[0] in decoder.stop_tokens or (
                    decoder.ends is not None and decoder.ends(self._said(number))
                )
                full = step + 1 == self.jobs[number].room
                if stopped or full or (not self.keep and step + 1 == self.length):
                    self.done[number] = self._segment(number, stopped=stopped, finished=stopped or full)
        return tokens

    def _said(self, number: int) -> list[int]:
        """All tokens of a row's response."""
        before = [token for segment in self.jobs[number].path[1:] for token in segment.tokens]
        return before + [token for token, *_ in self.chosen[number]]

    def _segment(self, number: int, *, stopped: bool, finished: bool) -> Segment:
        tokens, actions, logp, q = zip(*self.chosen[number], strict=True)
        return Segment(
            tokens=tokens,
            actions=actions,
            action_logp=logp,
            finished=finished,
            stopped=stopped,
            last_q=None if self.decoder.q is None else q[-1],
        )

    def _squeeze(self, live: list[int], tokens: torch.Tensor) -> torch.Tensor:
        """Drop the rows that are done once they are many; the next tokens of those that stay."""
        rows = self.rows
        if len(live) > len(rows.numbers) * (1 - SQUEEZE_SHARE):
            return tokens
        memory = rows.memory
        # The gaps before the last live rows are filled by them, as the engine does.
        count = len(live)
        gaps = sorted(set(range(count)) - set(live))
        order = list(range(count))
        for gap, mover in zip(gaps, live[count - len(gaps) :], strict=True):
            order[gap] = mover
        if gaps:
            memory.move([order[gap] for gap in gaps], gaps)
        memory.rows = count
        rows.numbers = [rows.numbers[place] for place in order]
        index = torch.tensor(order, device=tokens.device)
        rows.seen, rows.positions, rows.held, rows.uniforms = (
            tensor[index] for tensor in (rows.seen, rows.positions, rows.held, rows.uniforms)
        )
        rows.logits, rows.state = rows.logits[index], rows.state[index]
        rows.final = None if rows.final is None else rows.final[index]
        return tokens[index]

    def _keep(self) -> None:
        """Segments of the rows that go on, with their own columns of the caches and nothing before them."""
        rows = self.rows
        columns = slice(self.start, rows.memory.end)
        for place, number in enumerate(rows.numbers):
            if number in self.done:
                continue
            self.done[number] = replace(
                self._segment(number, stopped=False, finished=False),
                base=_cut(rows.base_cache, place, columns),
                policy=() if rows.policy_cache is None else _cut(rows.policy_cache, place, columns),
                logits=rows.logits[place].clone(),
                final=None if rows.final is None else rows.final[place].clone(),
                state=rows.state[place].clone(),
            )


def _columns(cache: Cache, row: int, count: int) -> Layers:
    """A row's last ``count`` columns of a prefilled cache (fewer where a block keeps a window only)."""
    return tuple(
        None if layer.keys is None else (layer.keys[row, :, -count:].clone(), layer.values[row, :, -count:].clone())
        for layer in cache.layers
    )


def _cut(cache: Cache, row: int, columns: slice) -> Layers:
    """A row's ``columns`` of a cache over slots."""
    return tuple(
        (layer.key_buffer.data[row, :, columns].clone(), layer.value_buffer.data[row, :, columns].clone())
        if isinstance(layer, SlotLayer)
        else None
        for layer in cache.layers
    )


def _filled(memory: SlotMemory, paths: Sequence[Sequence[Layers]]) -> Cache:
    """A cache over slots, a row per path, which ends at ``memory.end``; rows of one path in a row are filled at
    once."""
    layers: list[CacheLayerMixin] = []
    for number, like in enumerate(paths[0][0]):
        if like is None:
            layers.append(DynamicLayer())  # of a block that was dropped
            continue
        layer = memory.new_layer(like[0][None], like[1][None])
        for first, stop in _runs(paths):
            _fill(layer, slice(first, stop), [segment[number] for segment in paths[first]], memory.end)
        layers.append(layer)
    return Cache(layers=layers)


def _fill(layer: SlotLayer, rows: slice, parts: Sequence[tuple[torch.Tensor, torch.Tensor] | None], end: int) -> None:
    """Write a path's keys and values, segment by segment from its end, into ``rows``."""
    for part in reversed(parts):
        assert part is not None
        keys, values = part
        columns = slice(end - keys.shape[-2], end)
        layer.key_buffer.data[rows, :, columns] = keys
        layer.value_buffer.data[rows, :, columns] = values
        end = columns.start


def _runs(paths: Sequence[Sequence[Layers]]) -> list[tuple[int, int]]:
    """(first, stop) of neighbouring rows that end in the same segment."""
    starts = [0, *(row for row in range(1, len(paths)) if paths[row][-1] is not paths[row - 1][-1]), len(paths)]
    return list(pairwise(starts))
