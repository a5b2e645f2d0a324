"""Axes: round numbers for their ticks, and places on the paper."""

from __future__ import annotations

import math
from dataclasses import dataclass

WIDTH, LEFT, RIGHT, TOP = 460, 46, 450, 12
"""Of the paper and of the frame on it. Small paper keeps the letters readable on a phone."""


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover ``low`` to ``high``; at most ``most`` steps.

    ``ticks(0.13, 0.58)`` is ``[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]``.
    """
    if not high > low:
        low, high = low - (abs(low) / 2 or 0.5), low + (abs(low) / 2 or 0.5)
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(
        power * factor
        for factor in (1, 2, 5, 10, 20)
        if math.ceil(high / (power * factor)) - math.floor(low / (power * factor)) <= most
    )
    return [
        round(place * step, 12) for place in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)
    ]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Numbers between the first and the last tick, on paper from ``start`` to ``end``."""

    ticks: list[float]
    start: float
    end: float

    def at(self, value: float) -> float:
        """The place of ``value``; what lies outside is put to the edge."""
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return round(self.start + min(1.0, max(0.0, share)) * (self.end - self.start), 1)


def label(value: float) -> str:
    """A tick's text."""
    return f"{value:,.0f}" if abs(value) >= 1000 and value == round(value) else f"{value:.4g}"
