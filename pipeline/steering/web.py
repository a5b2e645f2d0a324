"""The steering page's application: one page, and four questions in JSON."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from pipeline.pages.explorer.records import as_data
from pipeline.steering.page import page, policy
from pipeline.steering.request import MOST_CHARACTERS, MOST_NEW_TOKENS, CandidatesRequest, SteeringRequest
from pipeline.steering.steerer import Steerer
from pipeline.web.guard import LARGEST_BODY, Application, RequestGuard
from pipeline.web.server import is_loopback, names_of
from rollout_workers.openai_api.errors import RefusedRequest
from rollout_workers.openai_api.requests import parse, read_body

WAITING = 8
"""Questions that may wait for the model; more are turned away."""
OFFERED = 100
"""Held-out prompts to pick from."""
Kind = TypeVar("Kind", bound=BaseModel)


def application(steerer: Steerer, host: str, token: str) -> Application:
    """The ASGI application of a service that listens on ``host``, for those who know ``token``."""
    # No pages of its own: those load scripts from elsewhere.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    desk = threading.BoundedSemaphore(WAITING)
    about, text = describe(steerer), page()

    async def tell(request: Request, kind: type[Kind], question: Callable[[Kind], Any]) -> Response:
        if not desk.acquire(blocking=False):
            return JSONResponse(
                RefusedRequest(f"{WAITING} questions are waiting already: ask again in a moment").body(),
                status_code=503,
            )
        try:
            body = await read_body(request.stream(), LARGEST_BODY)  # chunks may be more than their stated length
            return JSONResponse(as_data(await run_in_threadpool(lambda: question(parse(body, kind)))))
        except RefusedRequest as refusal:
            return JSONResponse(refusal.body(), status_code=refusal.status)
        finally:
            desk.release()

    @app.get("/")
    async def show() -> Response:
        return HTMLResponse(text, headers={"content-security-policy": policy()})

    @app.get("/api/model")
    async def model() -> Response:
        return JSONResponse(about)

    @app.post("/api/answer")
    async def answer(request: Request) -> Response:
        return await tell(request, SteeringRequest, steerer.answer)

    @app.post("/api/base")
    async def base(request: Request) -> Response:
        return await tell(request, SteeringRequest, steerer.base)

    @app.post("/api/candidates")
    async def candidates(request: Request) -> Response:
        return await tell(request, CandidatesRequest, partial(_candidates, steerer))

    return RequestGuard(app, names_of(host), token, everywhere=not is_loopback(host))


def _candidates(steerer: Steerer, question: CandidatesRequest) -> Any:
    return steerer.candidates(question.request(), question.place)


def describe(steerer: Steerer) -> dict[str, Any]:
    """What the page is told of the model once."""
    loaded = steerer.loaded
    return {
        "name": loaded.name,
        "num_codes": loaded.limits.num_actions,
        "span": loaded.limits.span,
        "max_tokens": loaded.limits.max_tokens,
        "most_tokens": MOST_NEW_TOKENS,
        "most_characters": MOST_CHARACTERS,
        "temperature": loaded.temperature,
        "task": None if loaded.task is None else loaded.task.name,
        "note": loaded.note,
        "prompts": [prompt.text for prompt in loaded.prompts[:OFFERED]],
    }
