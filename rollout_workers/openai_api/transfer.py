"""What a server of the protocol does with HTTP: bodies of bounded size, and clients that hang up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from rollout_workers.openai_api.errors import RefusedRequest

Result = TypeVar("Result")
HUNG_UP = 499
"""The status of what nobody reads; as web servers write it into their logs."""


async def read_body(chunks: AsyncIterable[bytes], most: int) -> bytes:
    """A body as it comes, whatever length it was said to have; ``RefusedRequest`` at more than ``most`` bytes, or where
    the client hangs up."""
    body = bytearray()
    try:
        async for chunk in chunks:
            body += chunk
            if len(body) > most:
                raise RefusedRequest(f"the body has more than {most} bytes: send fewer prompts at once", 413)
    except ClientDisconnect as error:
        raise RefusedRequest("the client hung up", HUNG_UP) from error
    return bytes(body)


async def until_hangup(request: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
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
