"""The verifier ``regex`` as a reward function, for ``function``, which loads this file by its path."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def pattern(row: Mapping[str, Any], response: str) -> bool:
    """Whether the row's answer, a regular expression, is found in the response."""
    return re.search(str(row["answer"]), response) is not None
