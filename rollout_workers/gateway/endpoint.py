"""The OpenAI endpoint of a rollout worker, on loopback: reads calls, hands them to the player, words the replies.

Tokens are sampled as the run's config says. What only changes how they are chosen (``temperature``, ``top_p``,
``top_k``, ``min_p``, ``seed``) is read and not used; what changes what may be written is refused by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Annotated, Any

import uvicorn
from pydantic import BaseModel, ConfigDict, Field
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from latent_control.text import end_tokens, spoken_text
from rollout_workers.gateway.session import Call, EpisodeSession
from rollout_workers.generated_row import Row
from rollout_workers.openai_api.errors import RefusedRequest
from rollout_workers.openai_api.keys import given_digest, key_digest, wrong_key
from rollout_workers.openai_api.logprobs import ChoiceState, LogprobWording
from rollout_workers.openai_api.protocol import DecodedRow
from rollout_workers.openai_api.replies import Wording, as_event
from rollout_workers.openai_api.requests import TOO_DEEP, ChatRequest, CompletionRequest, Request, parse
from rollout_workers.openai_api.text_stream import TokenTexts
from rollout_workers.openai_api.transfer import HUNG_UP, read_body, until_hangup
from rollout_workers.tasks.scorers import LARGEST

LARGEST_BODY = 8 << 20
MODEL = "policy"
"""The name of the model where a program asks for none: any is taken."""
GATHERED = 0.01
"""Seconds that a call waits for others, to be decoded with them."""
_KINDS: dict[str, type[ChatRequest] | type[CompletionRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}
_SESSIONS = "/v1/sessions/"
_ONE, _POLICY = "an episode has one reply to a call", "the policy chooses as it is, which is what is trained"
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), _ONE),
    "best_of": ((None, 1), _ONE),
    "presence_penalty": ((None, 0), _POLICY),
    "frequency_penalty": ((None, 0), _POLICY),
    "logit_bias": ((None, {}), _POLICY),
    "codes": ((None,), _POLICY),
    "allowed_codes": ((None,), _POLICY),
    "mix": ((None,), "one policy is trained"),
    "logprobs": ((None,), "code_logprobs come with every reply"),
    "echo": ((False,), "the prompt is yours"),
    "decode": ((None, "code"), "by token no codes are sampled"),
}
"""Field -> values at which it changes nothing, and why others cannot be recorded."""

Amount = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]


class GivenReward(BaseModel):
    """The body of ``POST /v1/sessions/{id}/reward``: what the last turn brought; several add up."""

    model_config = ConfigDict(extra="forbid")
    reward: Amount
    success: bool = False
    parts: dict[str, Amount] = Field(default_factory=dict, max_length=64)


def require_recordable(request: Request, stop: Sequence[str]) -> None:
    """``RefusedRequest`` where a request asks for what cannot be recorded; ``stop``: ``rollout.stop``."""
    for name, (neutral, why) in _REFUSED.items():
        value = request.top() if name == "logprobs" else getattr(request, name, neutral[0])
        if value not in neutral:
            raise RefusedRequest(f"{name} is not supported while rollouts are recorded: {why}", param=name)
    if request.limit() == 0:
        raise RefusedRequest("max_tokens is 0: ask for one token at least", param="max_tokens")
    asked = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if not set(asked) <= set(stop):
        raise RefusedRequest(
            f"stop={json.dumps(asked)[:80]} is not supported: responses end at rollout.stop={json.dumps(list(stop))} "
            "of the run's config; set it there",
            param="stop",
        )
    if isinstance(request, ChatRequest):
        wanted = request.response_format
        if request.must_call() or (wanted is not None and wanted.type != "text"):
            name = "tool_choice" if request.must_call() else "response_format"
            raise RefusedRequest(
                f"{name} binds what is written, and no grammar binds rollouts: leave it out", 400, name
            )


class Endpoint:
    """Runs from ``open`` to ``close``; calls come by ``waiting``, and their answers go into each ``Call.answer``."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[EpisodeSession, Call]] = queue.SimpleQueue()
        self._sessions: dict[str, EpisodeSession] = {}
        self._texts: TokenTexts | None = None
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self.address = ""
        """``http://127.0.0.1:PORT/v1``"""

    # -- the player's side -------------------------------------------------------------------------------------------

    def open(self, sessions: Iterable[EpisodeSession]) -> None:
        """Know these sessions, and listen."""
        self._sessions |= {key_digest(session.key): session for session in sessions}
        if self._server is not None:
            return
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        app = Starlette(routes=[Mount("", app=self._handle)])
        config = uvicorn.Config(app, log_level="error", ws="none", lifespan="off", server_header=False, http="h11",
                                timeout_graceful_shutdown=1)  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}, name="gateway", daemon=True
        )
        self._thread.start()

    def waiting(self, most: int, seconds: float) -> list[tuple[EpisodeSession, Call]]:
        """Up to ``most`` calls: none that come within ``seconds``, or the first and those that come right after it."""
        found: list[tuple[EpisodeSession, Call]] = []
        until = time.monotonic() + seconds
        with contextlib.suppress(queue.Empty):
            while len(found) < most:
                found.append(self._calls.get(timeout=max(0.0, until - time.monotonic())))
                until = until if len(found) > 1 else time.monotonic() + GATHERED
        return [(session, call) for session, call in found if not session.closed and not call.answer.cancelled()]

    def forget(self, session: EpisodeSession) -> None:
        """Its key opens nothing from now on; a call that waits gets no answer."""
        self._sessions.pop(key_digest(session.key), None)
        if session.open is not None:
            session.open.answer.cancel()

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None and self._thread is not None:
            self._server.handle_exit(0, None)
            self._thread.join(timeout=5.0)
            self._server = None

    # -- in the thread of the server ---------------------------------------------------------------------------------

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = HttpRequest(scope, receive)
        try:
            response = await self._respond(request)
        except (RefusedRequest, RecursionError) as error:
            refusal = error if isinstance(error, RefusedRequest) else RefusedRequest(TOO_DEEP)
            response = JSONResponse(refusal.body(), status_code=refusal.status, headers=refusal.headers)
        await response(scope, receive, send)

    async def _respond(self, request: HttpRequest) -> Response:
        session = self._sessions.get(given_digest(request.headers.get("authorization", "")))
        if session is None:
            raise wrong_key()
        path, method = request.url.path.rstrip("/"), request.method
        body = await read_body(request.stream(), LARGEST_BODY)
        if method == "POST" and path in _KINDS:
            reply = await until_hangup(request, self._reply(session, parse(body, _KINDS[path])))
            return reply or Response(status_code=HUNG_UP)
        if method == "POST" and path == f"{_SESSIONS}{session.id}/reward":
            given = parse(body, GivenReward)
            session.reward(given.reward, given.success, given.parts)
            return JSONResponse({"id": session.id, "reward": sum(session.rewards)})
        if method == "GET" and path.startswith("/v1/models"):
            name = path.removeprefix("/v1/models").lstrip("/")
            model = {"id": name or MODEL, "object": "model", "created": 0, "owned_by": "latent-control"}
            return JSONResponse(model if name else {"object": "list", "data": [model]})
        known = ", ".join([*_KINDS, "/v1/models", f"{_SESSIONS}{session.id}/reward"])
        raise RefusedRequest(f"Invalid URL ({method} {path}): there are {known}", 404)

    async def _reply(self, session: EpisodeSession, request: ChatRequest | CompletionRequest) -> Response:
        require_recordable(request, session.limits.stop)
        call = session.call(request)
        self._calls.put((session, call))
        try:
            row: Row = await asyncio.wrap_future(call.answer)
        except asyncio.CancelledError:
            session.drop(call)
            if not session.closed:
                raise  # the client hung up
            raise RefusedRequest("the episode has ended", 409) from None
        wording, answer = self._wording(session, request, call), _answer(session, row)
        if not request.stream:
            return JSONResponse(wording.whole([answer]))
        return StreamingResponse(_events(wording, answer), media_type="text/event-stream")

    def _wording(self, session: EpisodeSession, request: ChatRequest | CompletionRequest, call: Call) -> Wording:
        if self._texts is None or self._texts.tokenizer is not session.tokenizer:
            self._texts = TokenTexts(session.tokenizer)
        chat = isinstance(request, ChatRequest)
        return Wording(
            chat=chat,
            model=request.model or MODEL,
            logprobs=LogprobWording(chat=chat, texts=self._texts, ends=end_tokens(session.tokenizer)),
            decode="code",
            prompts=[call.ids],
            n=1,
            tools=call.names,
            with_prompt_ids=request.return_token_ids,
            with_usage=bool(request.stream_options and request.stream_options.include_usage),
        )


def _answer(session: EpisodeSession, row: Row) -> DecodedRow:
    tokens = row.tokens.tolist()
    return DecodedRow(
        text=spoken_text(session.tokenizer, tokens, session.limits.stop),
        tokens=tokens,
        codes=row.actions.tolist(),
        code_logp=row.action_logp.tolist(),
        finish_reason=row.finish_reason,
    )


async def _events(wording: Wording, answer: DecodedRow) -> AsyncIterator[str]:
    """A stream of the whole answer: tokens of an episode are decoded with its neighbours', and shown when all are
    there."""
    state = ChoiceState()
    events: list[dict[str, Any]] = [*wording.opening(0), wording.piece(0, answer, state)]
    events += wording.closing(0, answer, state)
    for event in [*events, *([wording.last([answer])] if wording.with_usage else [])]:
        yield as_event(event)
    yield "data: [DONE]\n\n"
