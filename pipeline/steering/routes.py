"""The steering page's routes: one document, and four questions in JSON that somebody else answers. No model is loaded
here: ``watch`` has these routes, too."""

from __future__ import annotations

from functools import cache

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from pipeline.pages.page import FRAMED, asset, document
from pipeline.web.questions import Ask, add_questions, refused
from rollout_workers.openai_api.errors import RefusedRequest

SCRIPTS = ("state.js", "answer.js", "candidates.js", "main.js")
"""One after the other they are the page's own script."""


@cache
def page() -> str:
    """The steering page, made of the shared look and scripts and its own; texts of models and tasks come as JSON."""
    body, style, *scripts = (asset(name, "pipeline.steering") for name in ("steering.html", "steering.css", *SCRIPTS))
    return document("Steering", scripts, style=style, body=body, live=True)


def routes(ask: Ask, prefix: str = "") -> APIRouter:
    """The page below ``prefix``, and its questions."""
    router = APIRouter(prefix=prefix)

    @router.get("/")
    async def show() -> Response:
        return HTMLResponse(page(), headers=FRAMED)

    @router.get("/api/model")
    async def model(request: Request) -> Response:
        try:
            return JSONResponse(await run_in_threadpool(lambda: ask(request, "model", b"")))
        except RefusedRequest as refusal:
            return refused(refusal)

    add_questions(router, "/api/{question}", ("answer", "base", "candidates"), ask)
    return router
