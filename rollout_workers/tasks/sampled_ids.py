"""Token ids beside the texts of rows that ``latent-control sample`` writes, so that a model's words are read back as
the tokens that it said: encoding a decoded text gives other ones wherever a tokenizer has several ways to write it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMN = "latent_control"
"""Of a row, beside the user's own columns."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledIds:
    """``SampledIds(tokenizer="9f86d081884c7d65", prompt=(5, 9), response=(7, 2), truncated=False)``"""

    tokenizer: str
    """``fingerprint`` of the tokenizer whose ids these are"""
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    """What was sampled: with the end token, or the token that completes a stop string"""
    truncated: bool
    """It was cut at ``rollout.max_new_tokens``."""

    def column(self) -> dict[str, Any]:
        """The value of ``COLUMN``."""
        return asdict(self)


def sampled_ids(row: Mapping[str, object], place: str) -> SampledIds | None:
    """The ids of a row; ``None`` where it has none, or its column of that name is the user's.

    Raises:
        ValueError: they are damaged.
    """
    found = row.get(COLUMN)
    if not isinstance(found, Mapping) or set(found) != set(SampledIds.__dataclass_fields__):
        return None
    tokenizer, cut = found["tokenizer"], found["truncated"]
    sides = [found["prompt"], found["response"]]
    if not (isinstance(tokenizer, str) and isinstance(cut, bool) and all(map(_are_ids, sides))):
        raise ValueError(
            f"{place}: {COLUMN!r} holds no token ids (whole numbers from 0 on): {str(found)[:80]}; make the file again "
            "by latent-control sample, or remove that column"
        )
    return SampledIds(tokenizer=tokenizer, prompt=tuple(sides[0]), response=tuple(sides[1]), truncated=cut)


def _are_ids(value: object) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        return False
    return all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31 for token in value)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Sixteen hexadecimal digits that name what each id means, added tokens included; the same wherever the tokenizer
    lies."""
    return _fingerprint(tokenizer, len(tokenizer))


@lru_cache(maxsize=16)
def _fingerprint(tokenizer: PreTrainedTokenizerBase, _: int) -> str:
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
        digest.update(f"{number} {token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def usable(ids: SampledIds, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the ids are ``tokenizer``'s own; those of another one are not read, which is said once."""
    if ids.tokenizer == fingerprint(tokenizer):
        return True
    _say_foreign(ids.tokenizer, str(tokenizer.name_or_path))
    return False


def foreign(theirs: str, name: str) -> str:
    """What is said of rows with another tokenizer's ids."""
    return (
        f"rows were sampled with another tokenizer (fingerprint {theirs}) than that of {name}: their texts are read, "
        "not their ids; sample again with this base LM: latent-control sample CONFIG"
    )


@lru_cache(maxsize=64)
def _say_foreign(theirs: str, name: str) -> None:
    _LOG.warning(foreign(theirs, name))
