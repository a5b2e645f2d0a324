"""A service behind HTTP, as an ASGI application: keys, bodies, hang-ups, errors. Ray Serve runs it, or any server."""

from __future__ import annotations

import hmac
import time
import uuid
from collections.abc import Callable

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from pipeline.serving.service import HEALTH, Service
from rollout_workers.openai_api.errors import RefusedRequest
from rollout_workers.openai_api.keys import given_digest, wrong_key
from rollout_workers.openai_api.transfer import HUNG_UP, read_body, until_hangup

LARGEST_BODY = 8 << 20
Told = Callable[[int, float, int], object]
"""Hears of each request when it has ended: status, seconds, tokens that the server decoded meanwhile and nobody has
counted yet."""


def application(service: Service, *, key: str | None = None, told: Told = lambda *_: None) -> Starlette:
    """The ASGI application; ``key``: digest of the key that requests must send."""
    counted = 0

    async def handle(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
            return
        nonlocal counted
        begun = time.perf_counter()
        response = await answer(service, Request(scope, receive), key)
        try:
            await response(scope, receive, send)
        finally:
            new, counted = service.loop.tokens - counted, service.loop.tokens
            told(response.status_code, time.perf_counter() - begun, new)

    async def failed(_: Request, __: Exception) -> Response:
        return refused(RefusedRequest("the server failed: its log says why", 500))

    return Starlette(routes=[Mount("", app=handle)], exception_handlers={Exception: failed})


async def answer(service: Service, request: Request, key: str | None = None) -> Response:
    """The response to one request, of whose body no more than ``LARGEST_BODY`` is read."""
    try:
        require_key(request, key)
        body = await read_body(request.stream(), LARGEST_BODY)
    except RefusedRequest as refusal:
        return refused(refusal)
    reply = await until_hangup(request, service.respond(request.method, request.url.path, body))
    if reply is None:
        return Response(status_code=HUNG_UP)
    headers = reply.headers | {"x-request-id": f"req_{uuid.uuid4().hex}"}
    if isinstance(reply.body, dict):
        return JSONResponse(reply.body, status_code=reply.status, headers=headers)
    return StreamingResponse(
        reply.body, media_type="text/event-stream", headers=headers | {"cache-control": "no-cache"}
    )


def refused(refusal: RefusedRequest) -> Response:
    """The response that says so."""
    return JSONResponse(refusal.body(), status_code=refusal.status, headers=refusal.headers)


def require_key(request: Request, digest: str | None) -> None:
    """``RefusedRequest`` (401) unless the request has the key of this digest; health checks need none.

    Digests are compared, in constant time: how long it takes says nothing about the key.
    """
    if digest is None or request.url.path.rstrip("/") == HEALTH:
        return
    if not hmac.compare_digest(given_digest(request.headers.get("authorization", "")), digest):
        raise wrong_key()
