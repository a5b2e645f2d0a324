"""The steering page's routes: one document, and four questions in JSON that somebody else answers. No model is loaded
here: ``watch`` has these routes, too."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from pipeline.steering.page import page, policy
from pipeline.web.questions import Ask, add_questions, refused
from rollout_workers.openai_api.errors import RefusedRequest


def routes(ask: Ask, prefix: str = "") -> APIRouter:
    """The page below ``prefix``, and its questions."""
    router, text = APIRouter(prefix=prefix), page()

    @router.get("/")
    async def show() -> Response:
        return HTMLResponse(text, headers={"content-security-policy": policy()})

    @router.get("/api/model")
    async def model(request: Request) -> Response:
        try:
            return JSONResponse(await run_in_threadpool(lambda: ask(request, "model", b"")))
        except RefusedRequest as refusal:
            return refused(refusal)

    add_questions(router, "/api/{question}", ("answer", "base", "candidates"), ask)
    return router
