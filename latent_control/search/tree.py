"""The tree of one prompt: which leaf to grow next, and what its value says about the nodes above it.

Children are chunks *sampled* from the policy, which so serves as the prior, and selection is UCT (Kocsis and
Szepesvari, 2006): mean value + c * sqrt(ln(visits of the parent) / visits). As a node is visited more, more children
are drawn (progressive widening, Coulom, 2007). The state of a node is its text alone, so chunks of the same tokens are
one child, whatever their codes. A finished child has
been valued once and for all: it counts in its parent's mean, but is not walked into again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from latent_control.distributions import rollout_seed
from latent_control.search.segments import Segment


@dataclass(kw_only=True, eq=False)
class Node:
    """A prefix of responses."""

    number: int
    """In the order in which the tree grew"""
    segment: Segment
    parent: Node | None
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    """By their tokens"""
    draws: int = 0
    """Chunks drawn from it"""
    visits: int = 0
    total: float = 0.0
    """Sum of the values of its visits"""
    pending: int = 0
    """Leaves below it that are being grown: each counts as a visit of value 0 until it is done"""

    @property
    def finished(self) -> bool:
        """It ends a response."""
        return self.segment.finished

    @property
    def mean(self) -> float:
        """Mean value of its visits."""
        return self.total / self.visits if self.visits else 0.0

    @property
    def path(self) -> list[Segment]:
        """The segments from the prompt on."""
        return [node.segment for node in reversed([self, *self.ancestors()])]

    def ancestors(self) -> Iterator[Node]:
        """From its parent to the root."""
        node = self.parent
        while node is not None:
            yield node
            node = node.parent

    def score(self, c: float) -> float:
        """UCT, with the leaves that are being grown counted as failures."""
        assert self.parent is not None
        visits = max(1, self.visits + self.pending)
        above = max(1, self.parent.visits + self.parent.pending)
        return self.total / visits + c * math.sqrt(math.log(above) / visits)


class Tree:
    """All that was tried after one prompt; grows by ``width`` chunks at a time."""

    def __init__(self, prompt: Segment, *, width: int, c: float, seed: int) -> None:
        self.root = Node(number=0, segment=prompt, parent=None)
        self.width, self.c, self.seed = width, c, seed
        self.nodes = [self.root]

    def select(self) -> Node:
        """The node to grow next; marked as being grown until ``backup``."""
        node = self.root
        while not self._is_due(node):
            node = max(
                (child for child in node.children.values() if not child.finished), key=lambda child: child.score(self.c)
            )
        for one in (node, *node.ancestors()):
            one.pending += 1
        return node

    def _is_due(self, node: Node) -> bool:
        """Whether chunks are to be drawn from a node: at first, as its visits grow, and when no other way down is
        left."""
        wanted = self.width * max(1, math.isqrt(node.visits // self.width))
        return node.draws < wanted or all(child.finished for child in node.children.values())

    def seeds(self, node: Node) -> list[int]:
        """Random streams of the next ``width`` chunks of a node; they are counted as drawn."""
        first, node.draws = node.draws, node.draws + self.width
        return [self._seed(node, draw, 1) for draw in range(first, node.draws)]

    def rollout_seed(self, node: Node) -> int:
        """Random stream of the rollout that values a node."""
        return self._seed(node, 0, 2)

    def _seed(self, node: Node, draw: int, kind: int) -> int:
        # Always as many parts, none of them 0 at the end: numpy's SeedSequence does not tell (1, 2) from (1, 2, 0).
        return rollout_seed(self.seed, node.number, draw, kind)

    def grow(self, node: Node, chunks: Sequence[Segment]) -> list[Node]:
        """Enter chunks drawn from a node; returns its children that are new."""
        fresh = []
        for chunk in chunks:
            if chunk.tokens in node.children:
                continue
            child = Node(number=len(self.nodes), segment=chunk, parent=node)
            node.children[chunk.tokens] = child
            self.nodes.append(child)
            fresh.append(child)
        return fresh

    def backup(self, node: Node, children: Sequence[Node], values: Sequence[float]) -> None:
        """A grown node's new children have these values: a visit of each, and of all nodes above.

        When nothing new was drawn, the node's own mean counts once more, so that the search looks elsewhere.
        """
        for child, value in zip(children, values, strict=True):
            child.visits, child.total = child.visits + 1, child.total + value
        added = list(values) or [node.mean]
        for one in (node, *node.ancestors()):
            one.pending -= 1
            one.visits += len(added)
            one.total += sum(added)

    @property
    def bytes(self) -> int:
        """Memory of all caches in the tree."""
        return sum(node.segment.bytes for node in self.nodes)
