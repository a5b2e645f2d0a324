"""What the environment of the process says that would end a run later: Ray's folder and its login."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from configs.schema import RunConfig
from pipeline.cluster.ray_token import TOKEN_FILE, TOKENS, has_token

AUTH_MODE, MODES = "RAY_AUTH_MODE", ("token", "disabled")
LONGEST = 107 if sys.platform.startswith("linux") else 103
"""Bytes that the system allows the path of a socket."""
SOCKET = "/ray/session_2026-11-30_14-59-00_123456_1234567/sockets/plasma_store"
"""The longest one of Ray's, below its folder for temporary files."""


def ray_problems(config: RunConfig) -> Iterator[str]:
    """Why Ray would not start, or the cluster not let this process in."""
    mode = os.environ.get(AUTH_MODE)
    if mode is not None and mode.lower() not in MODES:
        yield f"{AUTH_MODE}: {mode!r}, but Ray knows {' and '.join(MODES)}; set one of them, or unset it"
    if config.cluster.address != "local":
        if (mode or "").lower() == "token" and not has_token():
            yield (
                f"{AUTH_MODE}: token, but there is none: set {TOKENS[0]} to what ray get-auth-token says on the head, "
                f"or copy its {TOKEN_FILE}"
            )
        return
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "RAY_TMPDIR")
    folder = os.environ.get(name, "/tmp")
    length = len(os.fsencode(folder.rstrip("/") + SOCKET))
    if length > LONGEST:
        yield (
            f"{name}: {folder} is {length - LONGEST} characters too long for Ray's sockets; set RAY_TMPDIR to a "
            "shorter folder, e.g. RAY_TMPDIR=/tmp"
        )
