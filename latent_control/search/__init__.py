"""Search over chunks of codes: best-of-n, Monte-Carlo tree search, and tree search led by a Q head (docs/search.md)."""

from latent_control.search.best_of import Best, best_of_n, best_of_tokens, play_once
from latent_control.search.decoder import ChunkDecoder
from latent_control.search.mcts import SearchResult, SearchSettings, search
from latent_control.search.segments import Judge, SearchResponse, Segment, learned_value
from latent_control.search.tree import Node, Tree

__all__ = [
    "Best",
    "ChunkDecoder",
    "Judge",
    "Node",
    "SearchResponse",
    "SearchResult",
    "SearchSettings",
    "Segment",
    "Tree",
    "best_of_n",
    "best_of_tokens",
    "learned_value",
    "play_once",
    "search",
]
