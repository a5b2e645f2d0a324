"""A service in this process: asked without HTTP, or through a real HTTP server in a thread."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from pipeline.serving.service import Reply, Service
from pipeline.serving.web import application


def ask_all(service: Service, *bodies: Any, path: str = "/v1/completions", method: str = "POST") -> list[Reply]:
    """Replies to requests that come at once."""

    async def respond() -> list[Reply]:
        raw = [body if isinstance(body, bytes) else json.dumps(body).encode() for body in bodies]
        return list(await asyncio.gather(*(service.respond(method, path, body) for body in raw)))

    return asyncio.run(respond())


def said(service: Service, path: str = "/v1/completions", **body: Any) -> Any:
    """The body of a reply."""
    reply = ask_all(service, body, path=path)[0]
    assert reply.status == 200, reply.body
    return reply.body


def raw_events(service: Service, path: str = "/v1/completions", **body: Any) -> list[str]:
    """A stream's lines."""

    async def collect() -> list[str]:
        reply = await service.respond("POST", path, json.dumps(body | {"stream": True}).encode())
        assert not isinstance(reply.body, dict), reply.body
        return "".join([event async for event in reply.body]).split("\n\n")

    return asyncio.run(collect())


@contextmanager
def listening(service: Service, key: str | None = None) -> Iterator[str]:
    """The service behind HTTP; yields its address."""
    config = uvicorn.Config(application(service, key=key), host="127.0.0.1", port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
