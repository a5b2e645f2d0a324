"""The collected records of a run, from which the page's dataset is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.pages.explorer.corpus import Corpus
from pipeline.pages.explorer.path import Walked
from pipeline.pages.explorer.reading import Effects, Read
from pipeline.pages.explorer.records import Why


class Vocabulary:
    """Token ids to numbers in the order in which they are asked for, and their texts."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._numbers = tokenizer, dict[int, int]()

    def __call__(self, token: int) -> int:
        return self._numbers.setdefault(int(token), len(self._numbers))

    def texts(self) -> tuple[str, ...]:
        """The text of each number; special tokens by name."""
        return tuple(self._tokenizer.decode([token], skip_special_tokens=False) for token in self._numbers)


@dataclass(frozen=True, kw_only=True)
class Collected:
    """A run's rollouts and what the model says to those of the page."""

    corpus: Corpus
    """All that was read."""
    shown: Corpus
    """Those of the page."""
    rows: np.ndarray
    """Where these are in ``corpus``."""
    found: Read | None
    sums: Effects | None
    walked: Walked | None
    why: list[Why]
