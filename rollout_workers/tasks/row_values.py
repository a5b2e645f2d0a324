"""What a task reads off a user's row: values by (dotted) key, conversations, and the texts that say an answer."""

from __future__ import annotations

import datetime
import difflib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from rollout_workers.tasks.row_files import Row
from rollout_workers.tasks.sampled_ids import SampledIds

_ROLES = {"human": "user", "gpt": "assistant"}
ASSISTANT = "assistant"
Turn = tuple[str, str]
"""(role, content)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A row as the task sees it. ``Item(prompt="2 + 2?", answers=("4",), response=None, row={"q": "2 + 2?"})``"""

    prompt: str
    answers: tuple[str, ...]
    """Texts that are right answers; the first is trained on where there is no ``response``."""
    response: str | None
    """The text to train on that the options name."""
    row: Row
    """The user's own, whole and typed."""
    turns: tuple[Turn, ...] = ()
    """The conversation that the prompt is, where it is one."""
    ids: SampledIds | None = None
    """Of prompt and answer, in a file of ``latent-control sample``."""
    place: str = ""
    """File and line, for messages."""


def value_at(row: Row, key: str) -> object:
    """The column ``key``, else what the dotted key leads to: ``reward_model.ground_truth``, ``answers.0``.

    Raises:
        KeyError: there is nothing.
    """
    found = _inside(row, key)
    if not found:
        raise KeyError(key)
    return found[0]


def _inside(value: object, key: str) -> tuple[object, ...]:
    """What stands at the key, alone; names may have dots of their own, the longest name goes first."""
    if isinstance(value, Mapping):
        names = [key, *(key[:at] for at in range(len(key) - 2, 0, -1) if key[at] == ".")]
        children = [(value[name], key[len(name) + 1 :]) for name in names if name in value]
    elif isinstance(value, Sequence) and not isinstance(value, str):
        index, _, rest = key.partition(".")
        children = [(value[int(index)], rest)] if index.isdecimal() and int(index) < len(value) else []
    else:
        return ()
    return next((found for child, rest in children if (found := _inside(child, rest) if rest else (child,))), ())


def required(row: Row, key: str, place: str, option: str) -> object:
    """``value_at``; ``ValueError`` names place, key, the keys there are, and the option."""
    try:
        return value_at(row, key)
    except KeyError:
        near = difflib.get_close_matches(key, list(row), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"{place}: no key {key!r}; {hint}set task.options.{option} to one of "
            f"{', '.join(map(repr, row)) or 'its keys'}"
        ) from None


def conversation(value: object) -> tuple[Turn, ...]:
    """The turns of ``[{"role": "user", "content": "2 + 2?"}, ...]`` (or ``from`` and ``value``); none where ``value``
    is something else."""
    if not isinstance(value, list | tuple):
        return ()
    found = [_turn(child) for child in value]
    return tuple(turn for turn in found if turn is not None) if all(found) else ()


def _turn(value: object) -> Turn | None:
    if not isinstance(value, Mapping):
        return None
    role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    if isinstance(content, list):  # parts; of those only texts are understood
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        content = "".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else None
    return (_ROLES.get(role, role), content) if isinstance(role, str) and isinstance(content, str) else None


def asked(value: object) -> tuple[Turn, ...]:
    """The turns before the assistant's last one."""
    turns = conversation(value)
    return turns[:-1] if turns and turns[-1][0] == ASSISTANT else turns


def answers_of(value: object) -> tuple[str, ...]:
    """The texts that are right where ``value`` is the answer: any of a list, the last turn of a conversation; none
    where it is not an answer."""
    if turns := conversation(value):
        return spellings(turns[-1][1]) if turns[-1][0] == ASSISTANT else ()
    if not isinstance(value, list | tuple):
        return spellings(value)
    found = [spellings(child) for child in value]
    return tuple(dict.fromkeys(text for texts in found for text in texts)) if all(found) else ()


def spellings(value: object) -> tuple[str, ...]:
    """The texts that say a value: ``("4", "4.0")`` of 4.0; none of what is no text, number, truth value or date."""
    if isinstance(value, bool):
        return (str(value).lower(),)
    if isinstance(value, float | Decimal):
        if not math.isfinite(value):
            return ()
        plain = format(Decimal(str(value)), "f")
        plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
        return tuple(dict.fromkeys((plain, str(value))))
    plain_kind = isinstance(value, str | int | datetime.date | datetime.time | datetime.timedelta)
    return (str(value),) if plain_kind and str(value).strip() else ()


def inner(value: object) -> str:
    """A hint for a mapping: the dotted key of what it holds."""
    return f".{next(iter(value))}" if isinstance(value, Mapping) and value else ""


def require_one_copy(items: Sequence[Item], path: Path) -> None:
    """``ValueError`` where two folders within ``path`` hold the same prompts: configurations of one data set, or two
    copies of it."""
    first: dict[str, Path] = {}
    counts, again = Counter[Path](), Counter[tuple[Path, Path]]()
    for item in items if path.is_dir() else ():
        folder = Path(item.place.rpartition(",")[0]).parent
        counts[folder] += 1
        if (other := first.setdefault(item.prompt, folder)) != folder:
            again[other, folder] += 1
    for (one, two), count in again.items():
        if 2 * count > counts[two]:
            raise ValueError(
                f"task.options.path: {one} and {two} hold the same {count} prompts: configurations of one data set, or "
                "two copies; give the folder of one"
            )


def unusable(place: str, option: str, key: str, value: object) -> ValueError:
    """What is said of a row's value that is no prompt or answer."""
    inside = (
        f"set task.options.{option} to a key inside it, e.g. {key}{inner(value)}"
        if isinstance(value, Mapping) and value
        else "mend or remove the row"
    )
    return ValueError(f"{place}: {key!r} is {value!r:.60}, not a text or number; {inside}")
