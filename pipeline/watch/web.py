"""The application of ``watch``: its page, the explorer's and steering's beside it, what runs have to say, and a stream
of what is new. It changes nothing but the notes of a run."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from functools import cache, partial
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, StrictStr
from starlette.concurrency import run_in_threadpool

from pipeline.experiments.compare import MOST_RUNS, side_by_side
from pipeline.experiments.comparison_page import sections
from pipeline.pages.explorer.page import live_page
from pipeline.pages.page import FRAMED, asset, document
from pipeline.pages.records import as_data
from pipeline.replay.search import MOST_LETTERS, RolloutSearch
from pipeline.runs.layout import EXPLORER, REPORT
from pipeline.steering.routes import routes
from pipeline.watch.followed_run import FollowedRun, FollowedRuns
from pipeline.watch.notes import Note, keep_note, read_notes
from pipeline.web.guard import Application, RequestGuard
from pipeline.web.questions import add_questions, refused
from pipeline.web.server import names_of
from rollout_workers.openai_api.errors import RefusedRequest
from rollout_workers.openai_api.requests import parse

LOOK_SECONDS, MOST_SECONDS, BUSY_SHARE, WAKE_SECONDS = 1.0, 3.0, 0.03, 0.1
"""Between two looks at a run: so many seconds, or up to so many where a look takes more than this share of them. While
it waits, a stream looks this often whether the service is ending."""
SEARCHES = 4
"""At a time; more are turned away."""
SANDBOX = {"content-security-policy": "sandbox allow-scripts"}
"""Pages of a run folder may come from elsewhere: their scripts get no origin, so they cannot read this service."""
T = TypeVar("T")


class Explained(BaseModel):
    """The rollout to explain."""

    model_config = ConfigDict(extra="forbid")
    rollout: StrictStr = Field(max_length=1000)


class RolloutQuery(BaseModel):
    """A ``RolloutSearch`` as the page asks for it."""

    model_config = ConfigDict(extra="ignore")

    text: str = Field("", max_length=MOST_LETTERS)
    regex: bool = False
    prompt: str = Field("", max_length=MOST_LETTERS)
    success: Literal["all", "good", "bad"] = "all"
    finish: str = Field("", max_length=MOST_LETTERS)
    least_reward: float | None = Field(None, allow_inf_nan=False, alias="least")
    most_reward: float | None = Field(None, allow_inf_nan=False, alias="most")
    first_update: int | None = Field(None, ge=0, le=1 << 40, alias="first")
    last_update: int | None = Field(None, ge=0, le=1 << 40, alias="last")
    variant: str = Field("", max_length=MOST_LETTERS)
    """Of the evaluation's answers; empty: rollouts of training."""
    at: int = Field(0, ge=0, le=1 << 30)
    """How many of the newest are passed over."""

    def search(self) -> RolloutSearch:
        """What it means."""
        return RolloutSearch(**self.model_dump(exclude={"variant", "at"}))


@cache
def page() -> str:
    """The page, made of the shared look and scripts, the explorer's counterfactuals, and its own."""
    own = [asset(name, "pipeline.watch") for name in ("rollouts.js", "main.js")]
    scripts = [asset("why.js", "pipeline.pages.explorer"), *own]
    return document("Watch", scripts, body=asset("watch.html", "pipeline.watch"), live=True)


def application(runs: FollowedRuns, host: str, token: str, ending: threading.Event) -> Application:
    """The ASGI application of a service that listens on ``host``, for those who know ``token``; its streams close once
    ``ending`` is set."""
    # No pages of its own: those load scripts from elsewhere.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return refused(RefusedRequest(f"{first['loc'][-1]}: {first['msg']}"))

    @app.get("/")
    async def show() -> Response:
        return HTMLResponse(page(), headers=FRAMED)

    @app.get("/api/compare")
    async def compare(run: Annotated[list[str], Query(max_length=MOST_RUNS)]) -> Response:
        return await _answer(
            lambda: as_data(sections(side_by_side([runs.run(name).folder for name in dict.fromkeys(run)])))
        )

    app.include_router(_news_of(runs, ending))
    app.include_router(_files_of(runs))
    app.include_router(routes(partial(_asked, runs), "/runs/{name}/steer"))
    return RequestGuard(app, names_of(host), token)


async def _answer(work: Callable[[], T], shown: Callable[[T], Response] = JSONResponse) -> Response:
    try:
        return shown(await run_in_threadpool(work))
    except RefusedRequest as refusal:
        return refused(refusal)
    except LookupError as error:
        return refused(RefusedRequest(str(error.args[0]), 404))
    except (ValueError, OSError) as error:
        return refused(RefusedRequest(str(error)))


def _asked(runs: FollowedRuns, request: Request, question: str, body: bytes) -> Any:
    """The answer to a question about the run in the request's path."""
    try:
        run = runs.run(request.path_params["name"])
        if question == "explain":
            return run.explained(parse(body, Explained).rollout)
        if question == "note":
            return keep_note(run.folder, parse(body, Note))
        return run.model.ask(question, body)
    except LookupError as error:
        raise RefusedRequest(str(error.args[0]), 404) from error
    except OSError as error:
        raise RefusedRequest(str(error)) from error


def _news_of(runs: FollowedRuns, ending: threading.Event) -> APIRouter:
    """What a run has to say, and questions about it."""
    router, desk = APIRouter(prefix="/api/runs"), threading.BoundedSemaphore(SEARCHES)

    @router.get("")
    async def names() -> Response:
        return await _answer(runs.names)

    @router.get("/{name}/events")
    async def events(name: str) -> Response:
        return StreamingResponse(_news(partial(runs.run, name), ending), media_type="text/event-stream")

    @router.get("/{name}/rollouts")
    async def rollouts(name: str, wanted: Annotated[RolloutQuery, Query()]) -> Response:
        if not desk.acquire(blocking=False):
            return refused(RefusedRequest(f"{SEARCHES} searches are at work already: ask again in a moment", 503))
        try:
            return await _answer(lambda: runs.run(name).found(wanted.search(), wanted.at, wanted.variant))
        finally:
            desk.release()

    @router.get("/{name}/group")
    async def group(name: str, id: Annotated[str, Query(max_length=1000)]) -> Response:
        return await _answer(lambda: runs.run(name).group(id))

    @router.get("/{name}/notes")
    async def notes(name: str) -> Response:
        return await _answer(lambda: read_notes(runs.run(name).folder))

    @router.get("/{name}/{part}")
    async def sections_of(name: str, part: Literal["rewards", "result", "cost"]) -> Response:
        return await _answer(lambda: as_data(getattr(runs.run(name), part)()))

    add_questions(router, "/{name}/{question}", ("explain", "fires", "ablate", "note"), partial(_asked, runs))
    return router


def _files_of(runs: FollowedRuns) -> APIRouter:
    """Pages of a run: the explorer's by today's script, and the files as they are."""
    router = APIRouter(prefix="/runs/{name}")

    @router.get("/codes/")
    async def codes(name: str) -> Response:
        def find() -> str:
            path = runs.run(name).folder / EXPLORER
            if not path.is_file():
                raise LookupError(f"{name} has no {EXPLORER} yet: latent-control explain {path.parent} writes it")
            return live_page(path)

        return await _answer(find, lambda text: HTMLResponse(text, headers=FRAMED))

    @router.get("/{file}")
    async def file(name: str, file: str) -> Response:
        def find() -> Any:
            path = runs.run(name).folder / file
            if file not in (EXPLORER, REPORT) or not path.is_file():
                raise LookupError(f"{name} has no page {file[:80]!r}")
            return path

        return await _answer(find, lambda path: FileResponse(path, media_type="text/html", headers=SANDBOX))

    return router


async def _news(find: Callable[[], FollowedRun], ending: threading.Event) -> AsyncIterator[str]:
    """Server-sent events: each part of a run as it is, then again whenever it has changed. A run that cannot be read is
    looked at again: it may be mended, or come back."""
    sent: dict[str, str] = {}
    while not ending.is_set():
        began = time.thread_time()
        parts, busy = await run_in_threadpool(_parts, find)
        busy += time.thread_time() - began
        for name in [name for name in parts if parts[name] != sent.get(name)]:
            yield f"event: {name}\ndata: {parts[name]}\n\n"
        sent = parts
        pause = time.monotonic() + max(LOOK_SECONDS, min(MOST_SECONDS, busy / BUSY_SHARE))
        while time.monotonic() < pause and not ending.is_set():
            await asyncio.sleep(WAKE_SECONDS)


def _parts(find: Callable[[], FollowedRun]) -> tuple[dict[str, str], float]:
    """The run's parts, or why it cannot be read (``unread``); processor seconds that the look took."""
    began = time.thread_time()
    try:
        run = find()
        run.poll()
        parts = dict(run.parts)
    except (LookupError, ValueError, OSError) as error:
        parts = {"unread": json.dumps(str(error.args[0]) if isinstance(error, LookupError) else str(error))}
    return parts, time.thread_time() - began
