"""Python's plain values as JSON and back, types and all: tuples, sets, keys that are no texts, NaN, huge integers,
dates.

What goes to a verifier must be what its generator made: JSON alone has no tuples, and turns the key 1 into "1".
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

_EXACT = 2**53
_DATES: dict[str, Any] = {"datetime": datetime.datetime, "date": datetime.date, "time": datetime.time}
_TEXTS: dict[str, Callable[[str], Any]] = {"Fraction": Fraction, "Decimal": Decimal}
_FROM_TEXT: dict[str, Callable[[str], Any]] = {
    **_TEXTS,
    "int": lambda text: int(text, 16),
    "float": float.fromhex,
    "bytes": bytes.fromhex,
}
_MANY: dict[str, Callable[[Any], Any]] = {"tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value: Any, other: Callable[[Any], str] | None = None) -> Any:
    """As JSON: ``(1, 2)`` is ``{"tuple": [1, 2]}``.

    Args:
        other: writes what is none of the plain types; without it ``ValueError`` names such a type.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)  # numpy's texts are texts
    if type(value) is int:
        return value if -_EXACT < value < _EXACT else {"int": hex(value)}
    if isinstance(value, float):
        return {"float": float(value).hex()}
    if type(value) is list:
        return [encode(child, other) for child in value]
    if type(value) is dict:
        return {"dict": [[encode(key, other), encode(child, other)] for key, child in value.items()]}
    if type(value).__name__ in _MANY and type(value) is _MANY[type(value).__name__]:
        return {type(value).__name__: [encode(child, other) for child in value]}
    for name, kind in _DATES.items():
        if isinstance(value, kind):  # pandas' timestamps too
            return {name: value.isoformat()}
    if isinstance(value, datetime.timedelta):
        return {"timedelta": [value.days, value.seconds, value.microseconds]}
    if type(value) in _TEXTS.values():
        return {type(value).__name__: str(value)}
    if isinstance(value, complex):
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if other is not None:
        return other(value)
    raise ValueError(f"{type(value).__module__}.{type(value).__name__} cannot be handed to a verifier: {value!r:.80}")


def decode(value: Any) -> Any:
    """The value that ``encode`` was given."""
    if isinstance(value, list):
        return [decode(child) for child in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "dict":
        return {decode(key): decode(child) for key, child in held}
    if kind in _MANY:
        return _MANY[kind](decode(child) for child in held)
    if kind in _DATES:
        return _DATES[kind].fromisoformat(held)
    if kind == "timedelta":
        return datetime.timedelta(*held)
    if kind == "complex":
        return complex(*(float.fromhex(part) for part in held))
    return _FROM_TEXT[kind](held)
