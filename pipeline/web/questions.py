"""Questions that a page asks by POST: read within bounds, answered on another thread, a few at a time."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterable, Callable, Sequence
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool

from pipeline.web.guard import LARGEST_BODY

WAITING = 8
"""Questions that may wait for the model; more are turned away."""
Ask = Callable[[Request, str, bytes], Any]
"""From a request, the question's name and the body to JSON-able data, or ``Refusal``."""
Kind = TypeVar("Kind", bound=BaseModel)


class Refusal(ValueError):
    """A request that cannot be served, with its HTTP status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status

    def body(self) -> dict[str, Any]:
        """The reply."""
        return {"error": {"message": str(self)}}


def parsed(body: bytes, kind: type[Kind]) -> Kind:
    """The question in a body; ``Refusal`` where it is none."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Refusal(f"{where}: {first['msg']}" if where else first["msg"]) from error


async def read_body(chunks: AsyncIterable[bytes], most: int = LARGEST_BODY, refusal: type[Refusal] = Refusal) -> bytes:
    """A body as it comes, whatever length it was said to have; ``refusal`` at more than ``most`` bytes."""
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > most:
            raise refusal(f"the body has more than {most} bytes: send less at once", 413)
    return bytes(body)


def add_questions(router: APIRouter, path: str, names: Sequence[str], ask: Ask) -> None:
    """POST requests to ``path``, in which ``{question}`` is one of ``names``."""
    desk = threading.BoundedSemaphore(WAITING)

    @router.post(path)
    async def answer(request: Request) -> Response:
        question = request.path_params["question"]
        if question not in names:
            return refused(Refusal(f"{question[:40]!r} is not asked here; ask {', '.join(names)}", 404))
        if not desk.acquire(blocking=False):
            return refused(Refusal(f"{WAITING} questions are waiting already: ask again in a moment", 503))
        try:
            body = await read_body(request.stream())
            return JSONResponse(await run_in_threadpool(lambda: ask(request, question, body)))
        except Refusal as refusal:
            return refused(refusal)
        finally:
            desk.release()


def refused(refusal: Refusal) -> Response:
    """The reply to a request that is refused."""
    return JSONResponse(refusal.body(), status_code=refusal.status)
