"""Ray's token, by which a cluster knows who may use it."""

from __future__ import annotations

import os

TOKENS, TOKEN_FILE = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"), "~/.ray/auth_token"


def has_token() -> bool:
    """Whether Ray finds a token here."""
    return any(os.environ.get(name) for name in TOKENS) or os.path.isfile(os.path.expanduser(TOKEN_FILE))
