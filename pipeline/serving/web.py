"""A service behind HTTP, as an ASGI application: keys, bodies, hang-ups, errors. Ray Serve runs it, or any server."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from pipeline.serving.errors import RefusedRequest
from pipeline.serving.service import HEALTH, Reply, Service
from pipeline.web.questions import read_body

LARGEST_BODY = 8 << 20
_HUNG_UP = 499
"""What nobody reads; as web servers write it into their logs."""
Told = Callable[[int, float, int], object]
"""Hears of each request when it has ended: status, seconds, tokens that the server decoded meanwhile and nobody has
counted yet."""


def key_digest(key: str) -> str:
    """SHA-256 of an API key: what a server keeps of it."""
    return hashlib.sha256(key.encode()).hexdigest()


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
        body = await read_body(request.stream(), LARGEST_BODY, RefusedRequest)
    except RefusedRequest as refusal:
        return refused(refusal)
    reply = await until_hangup(request, service.respond(request.method, request.url.path, body))
    if reply is None:
        return Response(status_code=_HUNG_UP)
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
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not given.strip():
        raise RefusedRequest(
            "You didn't provide an API key: send it in the header Authorization: Bearer KEY", 401,
            headers={"www-authenticate": "Bearer"},
        )  # fmt: skip
    if not hmac.compare_digest(key_digest(given.strip()), digest):
        raise RefusedRequest("Incorrect API key provided", 401, headers={"www-authenticate": "Bearer"})


async def until_hangup(request: Request, work: Coroutine[Any, Any, Reply]) -> Reply | None:
    """What ``work`` returns; ``None``, and the work is cancelled, where the client hangs up before."""
    working = asyncio.ensure_future(work)
    hangup = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({working, hangup}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        working.cancel()
        hangup.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
