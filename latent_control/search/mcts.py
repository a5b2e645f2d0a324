"""Monte-Carlo tree search over chunks of codes (CoLA's search, arXiv 2503.21383): select, expand, value, back up.

An iteration grows one leaf of each tree by ``width`` sampled chunks. A new child that ends its response is valued by
the judge; any other by a rollout of the policy to the end, which the judge values (``search``), or by max_a Q(h, a)
without a rollout (``guided``: MCTS-Q). All prompts are searched side by side: one batch for the chunks of an iteration,
one for its rollouts.

The answer is the finished response with the highest value, of those in the tree and of the rollouts; among equals, the
one whose node was visited most, then the one found first. The search never stops early: with a verifier as judge it
would stop just when it has succeeded, and a comparison at equal budget would be unfair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from latent_control.search.decoder import ChunkDecoder, Job
from latent_control.search.segments import Judge, SearchResponse, Segment, response_of
from latent_control.search.tree import Node, Tree


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Dials of a search.

    ``SearchSettings(iterations=64, chunk=64, c=0.7, width=4, max_new_tokens=1024)`` is near to the paper's.
    """

    iterations: int = 64
    """Leaves grown per prompt"""
    chunk: int = 64
    """Tokens of a chunk"""
    c: float = 0.7
    """Weight of exploration in UCT"""
    width: int = 4
    """Chunks drawn from a node at a time"""
    max_new_tokens: int = 256
    """Of a response"""
    leaves: int = 1
    """Leaves of one tree grown at the same time; each counts as a failure until it is valued (virtual loss)"""
    guided: bool = False
    """MCTS-Q: codes are drawn from pi(a) exp(Q(h, a) / ``q_temperature``), and Q in place of rollouts values what is
    unfinished."""
    q_temperature: float = 0.1

    def __post_init__(self) -> None:
        wrong = [
            f"{name}={getattr(self, name)!r}"
            for name in ("iterations", "chunk", "width", "max_new_tokens", "leaves")
            if getattr(self, name) < 1
        ]
        if wrong or self.c < 0 or self.q_temperature <= 0:
            values = ", ".join([*wrong, f"c={self.c}", f"q_temperature={self.q_temperature}"])
            raise ValueError(f"{values}: numbers must be at least 1, c at least 0, q_temperature more than 0")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A whole response that a search has come by."""

    response: SearchResponse
    value: float
    node: Node
    """The one it ends in, or from which it was rolled out"""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What the search of one prompt ended with."""

    response: SearchResponse
    value: float
    tokens: int
    """Tokens generated for this prompt, all rows together"""
    responses: int
    """Whole responses that were valued"""
    nodes: int
    cache_bytes: int
    """Of the tree at its end, when it is largest"""


class _Search:
    """The tree of one prompt with what came of it."""

    def __init__(self, number: int, prompt: Segment, settings: SearchSettings, judge: Judge, seed: int) -> None:
        self.number, self.settings, self.judge = number, settings, judge
        self.tree = Tree(prompt, width=settings.width, c=settings.c, seed=seed)
        self.candidates: list[Candidate] = []
        self.tokens = 0

    def room(self, node: Node) -> int:
        """Tokens that may follow a node."""
        return self.settings.max_new_tokens - sum(len(segment.tokens) for segment in node.path[1:])

    def expansion(self, node: Node) -> Job:
        """The next chunks of a node."""
        return Job(path=node.path, seeds=self.tree.seeds(node), room=self.room(node))

    def rollout(self, node: Node) -> Job:
        """A response's rest from a node."""
        return Job(path=node.path, seeds=[self.tree.rollout_seed(node)], room=self.room(node))

    def count(self, chunks: Sequence[Segment]) -> None:
        """These were generated."""
        self.tokens += sum(len(chunk.tokens) for chunk in chunks)

    def finish(self, node: Node, rest: Sequence[Segment] = ()) -> float:
        """Judge the response that ends at a node, or with the ``rest`` rolled out from it; its value."""
        response = response_of([*node.path[1:], *rest])
        value = self.judge(self.number, response)
        self.candidates.append(Candidate(response=response, value=value, node=node))
        return value

    def result(self) -> SearchResult:
        """The best response."""
        # the first of equals
        best = max(self.candidates, key=lambda candidate: (candidate.value, candidate.node.visits))
        return SearchResult(
            response=best.response,
            value=best.value,
            tokens=self.tokens,
            responses=len(self.candidates),
            nodes=len(self.tree.nodes),
            cache_bytes=self.tree.bytes,
        )


Fresh = tuple[_Search, Node]


def search(
    decoder: ChunkDecoder,
    prompts: Sequence[Sequence[int]],
    judge: Judge,
    settings: SearchSettings,
    *,
    seeds: Sequence[int],
) -> list[SearchResult]:
    """Search every prompt, side by side; a prompt's result depends on its own seed alone.

    Memory: a prompt's tree holds the caches of at most iterations * width * chunk tokens, and its prompt's
    (``cache_bytes_bound``).

    Args:
        prompts: token ids.
        judge: values whole responses; prompt i is number i.

    Raises:
        ValueError: chunks would end inside a code, or a Q head is needed and missing.
    """
    if settings.guided and decoder.q is None:
        raise ValueError("a guided search needs a Q head: give the decoder one (latent-control train-q RUN makes it)")
    roots = decoder.prefill(prompts)
    searches = [
        _Search(i, root, settings, judge, seed) for i, (root, seed) in enumerate(zip(roots, seeds, strict=True))
    ]
    for first in range(0, settings.iterations, settings.leaves):
        at_once = min(settings.leaves, settings.iterations - first)
        _iterate(decoder, [(one, one.tree.select()) for one in searches for _ in range(at_once)], settings)
    for one in searches:
        if not one.candidates:
            _complete(decoder, one)
    return [one.result() for one in searches]


def cache_bytes_bound(prompt: Segment, settings: SearchSettings) -> int:
    """The most that the caches of one prompt's tree can take."""
    per_token = prompt.bytes / len(prompt.tokens)
    return int(per_token * (len(prompt.tokens) + settings.iterations * settings.width * settings.chunk))


def _iterate(decoder: ChunkDecoder, leaves: Sequence[Fresh], settings: SearchSettings) -> None:
    """Grow and value these leaves."""
    jobs = [one.expansion(leaf) for one, leaf in leaves]
    chunks = decoder.extend(jobs, settings.chunk, q_temperature=settings.q_temperature if settings.guided else None)
    grown: list[list[Node]] = []
    for (one, leaf), found in zip(leaves, chunks, strict=True):
        one.count(found)
        grown.append(one.tree.grow(leaf, found))
    fresh = [(one, node) for (one, _), nodes in zip(leaves, grown, strict=True) for node in nodes]
    values = iter(_values(decoder, fresh, settings))
    for (one, leaf), nodes in zip(leaves, grown, strict=True):
        one.tree.backup(leaf, nodes, [next(values) for _ in nodes])


def _values(decoder: ChunkDecoder, fresh: Sequence[Fresh], settings: SearchSettings) -> list[float]:
    """Values of new nodes: the judge's where a response ends, else Q's, or the judge's of a rollout."""
    if settings.guided:
        return [one.finish(node) if node.finished else decoder.value(node.segment) for one, node in fresh]
    open_ones = [(one, node) for one, node in fresh if not node.finished]
    rests = (
        decoder.extend([one.rollout(node) for one, node in open_ones], settings.max_new_tokens, keep=False)
        if open_ones
        else []
    )
    following = {id(node): rest for (_, node), rest in zip(open_ones, rests, strict=True)}
    for one, node in open_ones:
        one.count(following[id(node)])
    return [one.finish(node, following.get(id(node), ())) for one, node in fresh]


def _complete(decoder: ChunkDecoder, one: _Search) -> None:
    """No response has ended yet: play the most promising leaf to its end, greedily."""
    leaf = max((node for node in one.tree.nodes if not node.children), key=lambda node: (node.mean, -node.number))
    (rest,) = decoder.extend([one.rollout(leaf)], one.settings.max_new_tokens, keep=False, greedy=True)
    one.count(rest)
    one.finish(leaf, rest)
