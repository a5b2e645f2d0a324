"""Guards a page: only browser tabs that were opened by the printed link may send requests, and only small ones.

A page elsewhere can send requests to 127.0.0.1 from the visitor's browser, or have its own name resolve to it (DNS
rebinding). The first carries a foreign ``Origin``, the second a foreign ``Host``; a number cannot be rebound, so
numbers are taken as they are. Other users of this machine reach its ports as well: they do not know the token, the
first part of every path.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Application: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

LARGEST_BODY = 128 << 10
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


def new_token() -> str:
    """A token for one start of a service: 128 random bits in letters that a path may hold."""
    return secrets.token_urlsafe(16)


class RequestGuard:
    """An ASGI application before another one, which sees paths without the token: ``/TOKEN/api/model`` is
    ``/api/model`` there."""

    def __init__(self, inner: Application, names: frozenset[str], token: str, *, everywhere: bool = False) -> None:
        """``names``: what this service may be called besides a number, e.g. ``{"localhost"}``; ``everywhere``: by any
        number, not by loopback's only."""
        self.inner, self.names, self.everywhere = inner, names, everywhere
        self.prefix = f"/{token}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http":
            return  # no websockets
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}

        async def say(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        refusal = self.refusal(scope["method"], headers) or self.strange(scope["path"])
        if refusal is not None:
            status, words = refusal
            body = json.dumps({"error": {"message": words}}).encode()
            await say(
                {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]}
            )
            await say({"type": "http.response.body", "body": body})
            return
        path = scope["path"].removeprefix(self.prefix)
        await self.inner({**scope, "path": path, "raw_path": path.encode()}, receive, say)

    def refusal(self, method: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """(status, why) of a request that is not let in."""
        host = headers.get("host", "")
        if not self._is_ours(host):
            return 403, f"this service is not called {host[:100]!r}: open it at the address it printed"
        if method in ("GET", "HEAD"):
            return None  # without CORS headers, what these answer is unreadable elsewhere
        origin, site = headers.get("origin", f"http://{host}"), headers.get("sec-fetch-site", "none")
        if origin != f"http://{host}" or site not in ("same-origin", "none"):
            return 403, "a page of another origin may not ask here"
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return 415, "send JSON, and say so: content-type: application/json"
        length = headers.get("content-length", "")
        if not length.isdecimal():
            return 411, "say the body's size: content-length"
        if int(length) > LARGEST_BODY:
            return 413, f"the body has {length[:20]} bytes: at most {LARGEST_BODY} are read"
        return None

    def strange(self, path: str) -> tuple[int, str] | None:
        """(status, why) of a path that does not begin with the token."""
        begin, slash = path[: len(self.prefix)], path[len(self.prefix) : len(self.prefix) + 1]
        if hmac.compare_digest(begin.encode(), self.prefix.encode()) and slash == "/":
            return None
        return 403, "open the whole link that this service printed: its path begins with a token"

    def _is_ours(self, host: str) -> bool:
        name, colon, port = host.rpartition(":")
        if not (colon and port.isdecimal()):
            name = host
        if name.lower().rstrip(".") in self.names:
            return True
        try:
            return ipaddress.ip_address(name.strip("[]")).is_loopback or self.everywhere
        except ValueError:
            return False
