"""Code in a model's folder (``auto_map``): off unless a setting says otherwise, and never asked about on standard
input.

``transformers`` asks there as soon as ``trust_remote_code`` is left unset, and takes whatever happens to lie in the
pipe for the answer. So every loader of this project says it, ``False`` where no setting applies
(``tests/latent_control/bases/test_foreign_code.py`` reads the calls).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

BASE_KEY = "base.trust_remote_code"
"""The setting that lets a base LM's own code run."""


class NeedsCode(ValueError):
    """A model that ``transformers`` knows by code in its own folder only; the message names the folder and the
    remedy."""


def is_foreign(part: object) -> bool:
    """Whether a loaded model, config or tokenizer is of a class that came with its folder."""
    return type(part).__module__.partition(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME


@contextmanager
def code_refused(source: str | Path, *, key: str | None = BASE_KEY) -> Iterator[None]:
    """Around a loader: what ``transformers`` says of a model that needs code of its own, in one sentence with the
    remedy.

    Args:
        key: the setting that allows it; ``None`` where there is none.

    Raises:
        NeedsCode: the loader refused to run the code in ``source``.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code=True" not in str(error):
            raise
        remedy = "take a model whose architecture transformers knows"
        if key is not None:
            remedy = f"read that code, then set {key}: true (trust_remote_code=True in Python), or {remedy}"
        raise NeedsCode(f"{source} needs Python code of its own (auto_map), which is not run; {remedy}") from error
