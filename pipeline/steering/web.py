"""The steering page's application, and the answers to its questions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from pipeline.pages.records import as_data
from pipeline.steering.request import MOST_CHARACTERS, MOST_NEW_TOKENS, CandidatesRequest, SteeringRequest
from pipeline.steering.routes import routes
from pipeline.steering.steerer import Steerer
from pipeline.web.guard import Application, RequestGuard
from pipeline.web.server import is_loopback, names_of
from rollout_workers.openai_api.requests import parse

OFFERED = 100
"""Held-out prompts to pick from."""


def application(steerer: Steerer, host: str, token: str) -> Application:
    """The ASGI application of a service that listens on ``host``, for those who know ``token``."""
    # No pages of its own: those load scripts from elsewhere.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    answers = answers_of(steerer)
    app.include_router(routes(lambda _, question, body: answers[question](body)))
    return RequestGuard(app, names_of(host), token, everywhere=not is_loopback(host))


def answers_of(steerer: Steerer) -> dict[str, Callable[[bytes], Any]]:
    """The page's questions by name: from a body to JSON-able data, or ``RefusedRequest``."""

    def candidates(body: bytes) -> Any:
        question = parse(body, CandidatesRequest)
        return as_data(steerer.candidates(question, question.place))

    return {
        "model": lambda _: describe(steerer),
        "answer": lambda body: as_data(steerer.answer(parse(body, SteeringRequest))),
        "base": lambda body: as_data(steerer.base(parse(body, SteeringRequest))),
        "candidates": candidates,
    }


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
        "temperature": loaded.rollout.temperature,
        "task": None if loaded.task is None else loaded.task.name,
        "note": loaded.note,
        "prompts": [prompt.text for prompt in loaded.prompts[:OFFERED]],
    }
