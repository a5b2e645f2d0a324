"""Counts over rollouts: usage, where codes fire, and their n-grams. Plain numpy. Axes: C choices, N codes, K keys."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from latent_control.analysis.measures import ALIVE_SHARE
from pipeline.pages.explorer.corpus import Corpus

BEFORE = 3
"""Tokens of a context before the one a code produced."""
CONTEXTS, NGRAMS, LEAST = 6, 4, 5
"""Kept for each code; an n-gram must occur ``LEAST`` times in good and bad rollouts together."""
LABEL_Z, LABEL_SHARE = 4.0, 0.1
"""Of a label: its z, and the share of the code's choices that it is true of, at least."""
POINTS, PLACES = 50, 32
"""Most points over training, most positions kept apart."""


def entropy(shares: np.ndarray) -> np.ndarray:
    """In nats, of the last axis; 0 log 0 is 0."""
    return -np.where(shares > 0, shares * np.log(np.where(shares > 0, shares, 1.0)), 0.0).sum(-1)


def health(usage: np.ndarray) -> list[str]:
    """``active``: used more than a tenth of 1 / N; ``rare``; ``unused``."""
    least = ALIVE_SHARE / len(usage)
    return ["active" if share > least else "rare" if share > 0 else "unused" for share in usage]


def shares(keys: np.ndarray, codes: np.ndarray, count: int, num_actions: int) -> np.ndarray:
    """[K, N], each row summing to 1 where its key (0 to ``count`` - 1) occurs, else zeros."""
    table = (
        np.bincount(keys * num_actions + codes, minlength=count * num_actions).reshape(count, num_actions).astype(float)
    )
    return table / np.maximum(table.sum(1, keepdims=True), 1)


def token_entropies(codes: np.ndarray, tokens: np.ndarray, num_actions: int) -> np.ndarray:
    """[N], entropy of the tokens that each code produced."""
    there, local = np.unique(tokens, return_inverse=True)
    pairs, counts = np.unique(codes * len(there) + local, return_counts=True)
    totals = np.bincount(codes, minlength=num_actions)
    p = counts / totals[pairs // len(there)]
    return np.bincount(pairs // len(there), -p * np.log(p), minlength=num_actions)


def points(versions: np.ndarray, most: int = POINTS) -> tuple[np.ndarray, list[str]]:
    """The point of training each rollout [R] belongs to, and the points' names: ``"4-6"``, updates counted from 1."""
    there = np.unique(versions)
    parts = np.array_split(there, min(most, len(there)))
    names = [f"{p[0] + 1}" if len(p) == 1 else f"{p[0] + 1}-{p[-1] + 1}" for p in parts]
    place = np.repeat(np.arange(len(parts)), [len(p) for p in parts])
    return place[np.searchsorted(there, versions)], names


def bins(positions: np.ndarray, most: int = PLACES) -> tuple[np.ndarray, list[str]]:
    """The bin of each position [C], and the bins' names: one position each where there are few, else equally wide."""
    width = width_of(positions, most)
    count = int(positions.max()) // width + 1
    names = [str(i) if width == 1 else f"{i * width}-{(i + 1) * width - 1}" for i in range(count)]
    return positions // width, names


def nested(table: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """A table as the page's records have it."""
    return tuple(tuple(row) for row in table.tolist())


def width_of(positions: np.ndarray, most: int = PLACES) -> int:
    """How many positions share a bin."""
    return -(-(int(positions.max()) + 1) // most)


def contexts(corpus: Corpus) -> dict[int, list[tuple[tuple[int, ...], int, int, float, int]]]:
    """By code, where it fires most: (tokens before, token, count, share of these occurrences with this code, a
    rollout).

    At the beginning of a response the tokens before are the prompt's last ones.
    """
    at = corpus.choices
    before = np.stack([_earlier(corpus, at, back) for back in range(BEFORE, 0, -1)], 1)  # [C, BEFORE]
    keys = np.concatenate([before, corpus.tokens[at][:, None]], 1)
    _, first, key, seen = np.unique(keys, axis=0, return_index=True, return_inverse=True, return_counts=True)
    codes = corpus.actions[at]
    pairs, example, counts = np.unique(codes * len(seen) + key.reshape(-1), return_index=True, return_counts=True)
    found: dict[int, list[tuple[tuple[int, ...], int, int, float, int]]] = defaultdict(list)
    for place in np.argsort(-counts, kind="stable"):
        code, which = divmod(int(pairs[place]), len(seen))
        if len(found[code]) < CONTEXTS:
            *earlier, token = (int(t) for t in keys[first[which]])
            known, share = tuple(t for t in earlier if t >= 0), float(counts[place] / seen[which])
            found[code].append((known, token, int(counts[place]), share, int(corpus.rows[at[example[place]]])))
    return dict(found)


def _earlier(corpus: Corpus, at: np.ndarray, back: int) -> np.ndarray:
    """[C], the token ``back`` places before each choice; -1 where there is none."""
    own = corpus.positions[at] >= back
    found = corpus.tokens[np.maximum(at - back, 0)]
    for i in np.flatnonzero(~own):
        prompt, place = corpus.prompt_tokens[corpus.rows[at[i]]], corpus.positions[at[i]] - back
        found[i] = prompt[place] if -place <= len(prompt) else -1
    return found


def log_odds(high: np.ndarray, low: np.ndarray, highs: int | np.ndarray, lows: int | np.ndarray) -> np.ndarray:
    """z of the log odds ratio of counts ``high`` out of ``highs`` against ``low`` out of ``lows``, half a count added
    to each cell."""
    cells = high + 0.5, highs - high + 0.5, low + 0.5, lows - low + 0.5
    ratio = np.log(cells[0]) - np.log(cells[1]) - np.log(cells[2]) + np.log(cells[3])
    return ratio / np.sqrt(sum(1 / cell for cell in cells))


def labels(corpus: Corpus) -> dict[int, list[tuple[str, int, float, float, float]]]:
    """By code, what tells its choices from those of all other codes: (kind, value, share of its choices, share of the
    others', z of the log odds ratio), at most one of each kind and the surest first.

    Kinds: ``writes`` a token, at ``position`` of the response, ``after`` a token.
    """
    at = corpus.choices
    codes, uses = corpus.actions[at], np.bincount(corpus.actions[at], minlength=corpus.num_actions)
    kinds = {"writes": corpus.tokens[at], "position": corpus.places[at], "after": _earlier(corpus, at, 1)}
    found: dict[int, list[tuple[str, int, float, float, float]]] = defaultdict(list)
    for kind, values in kinds.items():
        there, local = np.unique(values, return_inverse=True)
        pairs, high = np.unique(codes * len(there) + local, return_counts=True)
        code, which = pairs // len(there), pairs % len(there)
        low, highs = np.bincount(local)[which] - high, uses[code]
        lows = np.maximum(len(at) - highs, 1)
        z = log_odds(high, low, highs, lows)
        named: set[int] = set()
        for p in np.argsort(-z, kind="stable"):
            k, value, here = int(code[p]), int(there[which[p]]), float(high[p] / highs[p])
            if z[p] >= LABEL_Z and here >= LABEL_SHARE and k not in named and value >= 0:
                named.add(k)
                found[k].append((kind, value, here, float(low[p] / lows[p]), float(z[p])))
    return {k: sorted(some, key=lambda one: -one[4]) for k, some in found.items()}


Gram = tuple[tuple[int, ...], tuple[int, ...], int, int, float]


def ngrams(corpus: Corpus, lengths: Sequence[int] = (2, 3)) -> tuple[dict[int, list[Gram]], dict[int, list[Gram]]]:
    """By code, the n-grams with it that tell good rollouts from bad ones: (codes, tokens, high, low, z), the best and
    the worst.

    Good: more reward than its group's mean. Rollouts at the mean tell nothing and are left out.
    """
    better: dict[int, list[Gram]] = defaultdict(list)
    worse: dict[int, list[Gram]] = defaultdict(list)
    grams = [gram for n in lengths for gram in _grams(corpus, n)]
    for side, sign in ((better, 1), (worse, -1)):
        for gram in sorted(grams, key=lambda gram: -sign * gram[4]):
            if sign * gram[4] <= 0:
                break
            for code in set(gram[0]):
                if len(side[code]) < NGRAMS:
                    side[code].append(gram)
    return dict(better), dict(worse)


def _grams(corpus: Corpus, n: int) -> list[Gram]:
    at = corpus.choices
    starts = np.arange(len(at) - n + 1)
    starts = starts[corpus.responses[at[starts]] == corpus.responses[at[starts + n - 1]]]  # never across an observation
    sign = np.sign(np.round(corpus.advantages, 9))[corpus.rows[at[starts]]]
    starts, sign = starts[sign != 0], sign[sign != 0]
    if not len(starts):
        return []
    codes = np.stack([corpus.actions[at[starts + i]] for i in range(n)], 1)
    there, number = np.unique(codes, axis=0, return_inverse=True)
    number = number.reshape(-1)
    high, low = (np.bincount(number[sign == s], minlength=len(there)) for s in (1, -1))
    z = log_odds(high, low, int(high.sum()), int(low.sum()))
    order, kept = np.argsort(number, kind="stable"), np.flatnonzero(high + low >= LEAST)
    ends = np.cumsum(high + low)
    found = []
    for g in kept:
        written = Counter(_written(corpus, int(starts[i]), n) for i in order[ends[g] - high[g] - low[g] : ends[g]])
        text = min(written, key=lambda tokens: (-written[tokens], tokens))
        found.append((tuple(map(int, there[g])), text, int(high[g]), int(low[g]), float(z[g])))
    return found


def _written(corpus: Corpus, start: int, n: int) -> tuple[int, ...]:
    """The tokens of ``n`` choices from choice ``start`` on."""
    first = int(corpus.choices[start])
    part = slice(first, first + n * corpus.span)
    own = (corpus.responses[part] == corpus.responses[first]) & corpus.generated[part]
    return tuple(corpus.tokens[part][own].tolist())


def overlap(
    codes: np.ndarray, tokens: np.ndarray, others: np.ndarray, their_tokens: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """[N, M]: sum over tokens of min(p(token | code), p(token | their code)), by what was produced in the rollouts of
    two runs."""
    there, local = np.unique(np.concatenate([tokens, their_tokens]), return_inverse=True)
    width = len(there)
    ours = shares(codes, local[: len(codes)], shape[0], width)
    theirs = shares(others, local[len(codes) :], shape[1], width)
    return np.stack([np.minimum(row, theirs).sum(1) for row in ours])
