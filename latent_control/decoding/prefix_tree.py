"""A prefix tree: what the frozen base has computed of token sequences, shared by all calls, groups, turns and policies.

The base's weights never change, so its keys, values and states of a prefix hold for every policy and version that reads
them; only a policy with attention of its own makes its cache again, from the states. After SGLang's radix tree (Zheng
et al., 2024): nodes hold runs of tokens, are split where sequences part, and leave in the order of their last use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

Layers = list[tuple[torch.Tensor, torch.Tensor] | None]
"""Per block of the base: keys and values [H, n, d] of n tokens; ``None`` where a block stores nothing."""


@dataclass(kw_only=True, eq=False)
class PrefixNode:
    """A run of tokens after its parent's."""

    tokens: tuple[int, ...]
    layers: Layers
    states: torch.Tensor | None
    """[n, D], what the policy reads at each token, where it reads more than the last one."""
    end: tuple[torch.Tensor, torch.Tensor] | None = None
    """[D], the base's final state at the last token and what the policy reads there, where that has been asked for."""
    parent: PrefixNode | None = None
    children: dict[int, PrefixNode] = field(default_factory=dict)
    used: int = 0

    @property
    def bytes(self) -> int:
        """Memory of its tensors."""
        tensors = [tensor for layer in self.layers if layer is not None for tensor in layer]
        tensors += [tensor for tensor in (self.states, *(self.end or ())) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """The longest known beginning of a sequence."""

    length: int
    parts: tuple[tuple[PrefixNode, int], ...]
    """(node, how many of its tokens) from the root on."""

    @property
    def end(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """[D], the base's final state at its last token and what the policy reads there, where they are known."""
        node, taken = self.parts[-1] if self.parts else (None, 0)
        return node.end if node is not None and taken == len(node.tokens) else None

    def states(self, length: int) -> torch.Tensor | None:
        """[length, D] of its first tokens."""
        found = [node.states[:taken] for node, taken in self.first(length) if node.states is not None]
        return torch.cat(found) if found else None

    def first(self, length: int) -> Iterator[tuple[PrefixNode, int]]:
        """The parts of its first ``length`` tokens."""
        for node, taken in self.parts:
            if length <= 0:
                return
            yield node, min(taken, length)
            length -= taken


class PrefixTree:
    """What has been computed of one base for actors that read one of its states, in at most ``megabytes``."""

    def __init__(self, megabytes: float) -> None:
        self.room = megabytes * 2**20
        self.root = PrefixNode(tokens=(), layers=[], states=None)
        self.bytes = self._clock = 0
        self.computed, self.reused, self.evicted = 0, 0, 0
        """Prompt tokens that passed through the base, those that did not need to, nodes that left."""

    def match(self, tokens: Sequence[int]) -> Prefix:
        """The longest beginning of ``tokens`` that is known; its nodes count as used now."""
        self._clock += 1
        node, place, parts = self.root, 0, []
        while place < len(tokens) and (child := node.children.get(tokens[place])) is not None:
            taken = _common(child.tokens, tokens[place : place + len(child.tokens)])
            child.used = self._clock
            parts.append((child, taken))
            place += taken
            if taken < len(child.tokens):
                break
            node = child
        return Prefix(length=place, parts=tuple(parts))

    def insert(
        self,
        tokens: Sequence[int],
        layers: Layers,
        states: torch.Tensor | None,
        end: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        """Add what is not known yet of ``tokens``: ``layers``, ``states`` hold their last n tokens, which must begin
        within what is known; they are copied. Nodes used longest ago leave when there is no more room."""
        known = self.match(tokens)
        node = self._end(known)
        if known.length == len(tokens):
            if end is not None and node.end is None and node is not self.root:
                before, node.end = node.bytes, (end[0].clone(), end[1].clone())
                self.bytes += node.bytes - before
                self._evict()
            return
        new = len(tokens) - known.length
        child = PrefixNode(
            tokens=tuple(tokens[known.length :]),
            layers=[None if layer is None else (_tail(layer[0], new), _tail(layer[1], new)) for layer in layers],
            states=None if states is None else states[len(states) - new :].clone(),
            end=None if end is None else (end[0].clone(), end[1].clone()),
            parent=node,
            used=self._clock,
        )
        if child.bytes > self.room:
            return
        node.children[child.tokens[0]] = child
        self.bytes += child.bytes
        self._evict()

    def _end(self, known: Prefix) -> PrefixNode:
        """The node that ends where ``known`` does; one that goes on is split there."""
        if not known.parts:
            return self.root
        node, taken = known.parts[-1]
        if taken == len(node.tokens):
            return node
        # Whoever matched ``node`` may still read it: it is replaced, not changed.
        head = PrefixNode(tokens=node.tokens[:taken], parent=node.parent, used=node.used, **_slice(node, 0, taken))
        rest = PrefixNode(
            tokens=node.tokens[taken:],
            parent=head,
            used=node.used,
            end=node.end,
            children=node.children,
            **_slice(node, taken, len(node.tokens)),
        )
        assert node.parent is not None
        node.parent.children[head.tokens[0]], head.children[rest.tokens[0]] = head, rest
        for child in rest.children.values():
            child.parent = rest
        return head

    def _evict(self) -> None:
        while self.bytes > self.room:
            leaves = sorted((node for node in _nodes(self.root) if not node.children), key=lambda node: node.used)
            for node in leaves:
                assert node.parent is not None
                del node.parent.children[node.tokens[0]]
                self.bytes -= node.bytes
                self.evicted += 1
                if self.bytes <= self.room:
                    return


def prompt_counts(tree: PrefixTree | None) -> tuple[int, int]:
    """Prompt tokens so far: those that the base computed, those that it did not need to."""
    return (0, 0) if tree is None else (tree.computed, tree.reused)


def past_cache(prefixes: Sequence[Prefix], lengths: Sequence[int], like: Cache) -> Cache:
    """A cache with the first ``lengths`` tokens of ``prefixes``, left padded to the longest; an empty ``like`` where
    there are none. Padding is 0: what is masked must still be finite."""
    width = max(lengths)
    found = next((prefix.parts[0][0].layers for prefix in prefixes if prefix.parts), [])
    for number, layer in enumerate(found if width else []):
        if layer is None:
            continue
        keys, values = (t.new_zeros(len(prefixes), t.shape[0], width, t.shape[2]) for t in layer)
        for row, (prefix, length) in enumerate(zip(prefixes, lengths, strict=True)):
            place = width - length
            for node, taken in prefix.first(length):
                own = node.layers[number]
                assert own is not None
                keys[row, :, place : place + taken] = own[0][:, :taken]
                values[row, :, place : place + taken] = own[1][:, :taken]
                place += taken
        like.update(keys, values, number)
    return like


def shareable(cache: Cache) -> bool:
    """Whether a base's ``cache`` is keys and values of each token: a sliding window is a mask on those."""
    return all(isinstance(layer, DynamicLayer) for layer in cache.layers)


def row_layers(cache: Cache, row: int, first: int) -> Layers:
    """Keys and values of a row from column ``first`` on."""
    return [
        None
        if layer.keys is None or layer.values is None
        else (layer.keys[row, :, first:], layer.values[row, :, first:])
        for layer in cache.layers
    ]


def shared_beginnings(rows: Sequence[Sequence[int]], least: int) -> list[tuple[int, ...]]:
    """Beginnings that two or more of the different ``rows`` have in common, shortest first; each goes on for ``least``
    tokens or more after the one before it (a few-shot prefix, an opening that a group shares)."""
    ordered, found = sorted({tuple(row) for row in rows}), []
    waiting = [(0, len(ordered), 0)]  # runs of rows, which begin alike, and how much of that is in ``found``
    while waiting:
        first, stop, depth = waiting.pop()
        if stop - first < 2:
            continue
        common = _common(ordered[first], ordered[stop - 1])
        if common - depth >= least:
            found.append(ordered[first][:common])
            depth = common
        place = first + (len(ordered[first]) == common)
        while place < stop:
            end = place + 1
            while end < stop and ordered[end][common] == ordered[place][common]:
                end += 1
            waiting.append((place, end, depth))
            place = end
    return sorted(found, key=len)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _slice(node: PrefixNode, first: int, stop: int) -> dict[str, Any]:
    """Layers and states of a node's tokens from ``first`` to ``stop``, copied: each part's memory is its own."""
    return {
        "layers": [
            None if x is None else (x[0][:, first:stop].clone(), x[1][:, first:stop].clone()) for x in node.layers
        ],
        "states": None if node.states is None else node.states[first:stop].clone(),
    }


def _tail(tensor: torch.Tensor, count: int) -> torch.Tensor:
    return tensor[:, tensor.shape[1] - count :].clone()


def _nodes(node: PrefixNode) -> Iterator[PrefixNode]:
    waiting = list(node.children.values())
    while waiting:
        one = waiting.pop()
        yield one
        waiting += one.children.values()
