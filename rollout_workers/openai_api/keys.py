"""API keys: a server keeps their SHA-256 alone."""

from __future__ import annotations

import hashlib

from rollout_workers.openai_api.errors import RefusedRequest

_BEARER = {"www-authenticate": "Bearer"}


def key_digest(key: str) -> str:
    """SHA-256 of an API key: what a server keeps of it."""
    return hashlib.sha256(key.encode()).hexdigest()


def given_digest(authorization: str) -> str:
    """Digest of the key in a request's header; ``RefusedRequest`` (401) where there is none."""
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() != "bearer" or not given.strip():
        raise RefusedRequest(
            "You didn't provide an API key: send it in the header Authorization: Bearer KEY", 401, headers=_BEARER
        )
    return key_digest(given.strip())


def wrong_key() -> RefusedRequest:
    """What is answered to a key that is not the one."""
    return RefusedRequest("Incorrect API key provided", 401, headers=_BEARER)
