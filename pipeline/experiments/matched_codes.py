"""Codes of several runs matched with each other, by the tokens that they produced in the rollouts of the runs'
explorers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.pages.explorer.counts import overlap
from pipeline.pages.explorer.page import read_page
from pipeline.runs.layout import EXPLORER

TOP = 3
"""Tokens that are named of a code."""


def matched(folders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """The first run's codes, the most used first, each with the most similar one of every other run:
    ``{"A": {"code", "usage", "gain", "tokens"}, "B": {..., "overlap"}}``; runs without an explorer are left out."""
    runs = {name: found for name, folder in folders.items() if (found := _read(folder / EXPLORER)) is not None}
    if len(runs) < 2:
        return []
    number: dict[str, int] = {}
    pairs = {name: _pairs(run, number) for name, run in runs.items()}
    (first, run), *others = runs.items()
    tables = {
        name: overlap(*pairs[first], *pairs[name], (len(run["codes"]), len(other["codes"]))) for name, other in others
    }
    order = sorted(range(len(run["codes"])), key=lambda k: -run["codes"][k]["usage"])

    def row(k: int) -> dict[str, Any]:
        found = {first: _code(run, k)}
        for name, other in others:
            best = int(tables[name][k].argmax())
            found[name] = _code(other, best) | {"overlap": float(tables[name][k, best])}
        return found

    return [row(k) for k in order if run["codes"][k]["uses"]]


def _read(path: Path) -> Any:
    try:
        return read_page(path)["runs"][0]
    except (ValueError, OSError):
        return None


def _pairs(run: Any, number: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Code and token (by its text, as runs may differ in tokenizer) of each choice on the page."""
    words = [number.setdefault(text, len(number)) for text in run["vocabulary"]]
    found = [
        (code, words[token])
        for rollout in run["rollouts"]
        for code, token in zip(rollout["codes"], rollout["tokens"], strict=True)
        if code >= 0
    ]
    codes, tokens = np.array(found, np.int64).reshape(-1, 2).T
    return codes, tokens


def _code(run: Any, k: int) -> dict[str, Any]:
    code = run["codes"][k]
    tokens = dict.fromkeys(run["vocabulary"][context["token"]] for context in code["contexts"])
    gain = code["gain"] and code["gain"]["mean"]
    return {"code": k, "usage": code["usage"], "gain": gain, "tokens": list(tokens)[:TOP]}
