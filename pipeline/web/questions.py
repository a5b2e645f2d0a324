"""Questions that a page asks by POST: read within bounds, answered on another thread, a few at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from pipeline.web.guard import LARGEST_BODY
from rollout_workers.openai_api.errors import RefusedRequest
from rollout_workers.openai_api.transfer import read_body

WAITING = 8
"""Questions that may wait for the model; more are turned away."""
Ask = Callable[[Request, str, bytes], Any]
"""From a request, the question's name and the body to JSON-able data, or ``RefusedRequest``."""


def add_questions(router: APIRouter, path: str, names: Sequence[str], ask: Ask) -> None:
    """POST requests to ``path``, in which ``{question}`` is one of ``names``."""
    desk = threading.BoundedSemaphore(WAITING)

    @router.post(path)
    async def answer(request: Request) -> Response:
        question = request.path_params["question"]
        if question not in names:
            return refused(RefusedRequest(f"{question[:40]!r} is not asked here; ask {', '.join(names)}", 404))
        if not desk.acquire(blocking=False):
            return refused(RefusedRequest(f"{WAITING} questions are waiting already: ask again in a moment", 503))
        try:
            body = await read_body(request.stream(), LARGEST_BODY)
            return JSONResponse(await run_in_threadpool(lambda: ask(request, question, body)))
        except RefusedRequest as refusal:
            return refused(refusal)
        finally:
            desk.release()


def refused(refusal: RefusedRequest) -> Response:
    """The reply to a request that is refused."""
    return JSONResponse(refusal.body(), status_code=refusal.status)
