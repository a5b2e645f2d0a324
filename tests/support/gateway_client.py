"""What an agent program of the tests does with the standard library alone."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from typing import Any

EPISODE = json.loads(os.environ.get("LATENT_CONTROL_EPISODE", "{}"))


class Refused(Exception):
    """The gateway has refused a request."""


def post(path: str, **body: Any) -> dict[str, Any]:
    """The reply to ``POST $OPENAI_BASE_URL/path``."""
    request = urllib.request.Request(
        f"{os.environ['OPENAI_BASE_URL']}/{path}",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request) as reply:
            found: dict[str, Any] = json.loads(reply.read())
            return found
    except urllib.error.HTTPError as error:
        raise Refused(json.loads(error.read())["error"]["message"]) from error


def reward(value: float, **more: Any) -> None:
    """Give the last turn a reward."""
    post(f"sessions/{os.environ['LATENT_CONTROL_SESSION']}/reward", reward=value, **more)
