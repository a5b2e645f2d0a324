"""A served export: requests in, replies out. HTTP and Ray come in ``pipeline/serving/web.py`` and ``deploy.py``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from latent_control.auto import LatentActionForCausalLM
from latent_control.auto_generation import decoding_of
from latent_control.decoding.prefix_tree import PrefixTree
from latent_control.decoding.sampling_params import MIXTURE_CODES, SamplingParams
from latent_control.decoding.stream_engine import StreamEngine
from latent_control.decoding.token_scores import TokenScore, prompt_scores
from latent_control.model import latent_actor
from latent_control.text import config_ends, load_tokenizer
from pipeline.serving.bank import WORLD, is_bank
from pipeline.serving.decode_loop import DecodeLoop, DecodingRow
from pipeline.serving.members import ServedMembers
from pipeline.serving.reading import RequestReader
from rollout_workers.openai_api.errors import RefusedRequest
from rollout_workers.openai_api.logprobs import ChoiceState, Echo, LogprobWording
from rollout_workers.openai_api.protocol import DecodedRow, DecodeRequest, ModelLimits
from rollout_workers.openai_api.replies import Wording, as_event
from rollout_workers.openai_api.requests import TOO_DEEP, ChatRequest, CompletionRequest, NamedTool, Request
from rollout_workers.openai_api.text_stream import TextStream, TokenTexts

PREFIX_CACHE_MB = 512
"""What a replica keeps of prompts over requests and users."""
SLOTS, QUEUE = 256, 1024
"""Rows decoded at once, and rows that may wait, where nobody says how many."""
KINDS: dict[str, type[Request]] = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest}
MODELS, HEALTH = "/v1/models", "/health"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Status, headers and body: JSON, or events."""

    status: int
    body: dict[str, Any] | AsyncIterator[str]
    headers: dict[str, str] = field(default_factory=dict)


class Service:
    """A loaded export."""

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        device: str | None = None,
        base: str | None = None,
        decode: str | None = None,
        slots: int = SLOTS,
        queue: int = QUEUE,
    ) -> None:
        """``folder``: an export, or a bank, whose members are served; ``decode``: where a request does not say;
        ``None``: the export's own; ``slots``, ``queue``: rows decoded at once, and rows that may wait."""
        bank, folder = (folder, folder / WORLD) if is_bank(folder) else (None, folder)
        model = LatentActionForCausalLM.from_pretrained(
            folder, base=base, device_map=device or "auto", trust_remote_code=False
        )
        self.latent, self.started = model.latent, int(time.time())
        self.tree = PrefixTree(PREFIX_CACHE_MB)
        self.members = None if bank is None else ServedMembers(bank, self.latent.base.lm.device)
        self.actor = latent_actor(self.latent, None if self.members is None else self.members.bank)
        self.tokenizer = load_tokenizer(folder, key=None)
        self.ends = list(config_ends(model.generation_config))
        stop = model.generation_config.stop_strings or ()
        self.stop = (stop,) if isinstance(stop, str) else tuple(stop)
        sampled, config = model.generation_config.do_sample, self.latent.config
        self.decoding = decoding_of(model.generation_config) | ({} if decode is None else {"decode": decode})
        SamplingParams(max_new_tokens=1, **self.decoding)  # the export's file may have been edited: refused here
        self.limits = ModelLimits(
            model=name,
            num_actions=config.num_actions,
            span=config.span,
            positions=getattr(self.latent.base.decoder.config, "max_position_embeddings", None),
            max_tokens=model.generation_config.max_new_tokens,
            vocabulary=self.latent.base.lm.get_input_embeddings().weight.shape[0],
            temperature=(model.generation_config.temperature or 1.0) if sampled else 0.0,
            decode=self.decoding.get("decode", "code"),
        )
        self.texts = TokenTexts(self.tokenizer)
        self.reader = RequestReader(self.latent.base, self.tokenizer, self.limits, self.ends, self.members)
        self.slots = slots
        self.loop = DecodeLoop(self._engine, self.tokenizer, queue)

    def _engine(self) -> StreamEngine:
        count = self.decoding.get("mixture_codes", MIXTURE_CODES)
        return StreamEngine(
            self.latent.base, self.actor, slots=self.slots, ends=self.ends, tree=self.tree, mixture_codes=count
        )

    # -- requests ----------------------------------------------------------------------------------------------------

    async def respond(self, method: str, path: str, body: bytes) -> Reply:
        """The reply to one HTTP request."""
        try:
            return await self._respond(method, path.rstrip("/"), body)
        except (RefusedRequest, RecursionError) as error:
            refusal = error if isinstance(error, RefusedRequest) else RefusedRequest(TOO_DEEP)
            return Reply(status=refusal.status, body=refusal.body(), headers=refusal.headers)

    async def _respond(self, method: str, path: str, body: bytes) -> Reply:
        if path not in KINDS and path not in (MODELS, HEALTH) and not path.startswith(f"{MODELS}/"):
            raise RefusedRequest(
                f"Invalid URL ({method} {path or '/'}): there are {', '.join([*KINDS, MODELS, HEALTH])}", 404
            )
        if method != (needed := "POST" if path in KINDS else "GET"):
            raise RefusedRequest(f"{path} takes {needed}, not {method}", 405, code="method_not_supported",
                                 headers={"allow": needed})  # fmt: skip
        if path == HEALTH:
            return Reply(status=200, body={"status": "ok"} | self.loop.state())
        if path not in KINDS:
            return Reply(status=200, body=await asyncio.to_thread(self._models, path[len(MODELS) + 1 :]))
        # In a thread: others are read, and health checks answered, while a long text is tokenised.
        request, asks, model = await asyncio.to_thread(self.reader.read, body, KINDS[path])
        self.loop.require_room(len(asks))
        wording = await self._wording(request, asks, model)
        if request.stream:
            return Reply(status=200, body=self._events(asks, wording))
        answers = await _together([self._decoded(self._row(ask)) for ask in asks])
        return Reply(status=200, body=wording.whole(answers))

    async def _wording(self, request: Request, asks: Sequence[DecodeRequest], model: str) -> Wording:
        """How the reply is worded; where a completion begins with its prompts, these are scored now."""
        firsts, echoes = asks[:: request.n], list[Echo]()
        if isinstance(request, CompletionRequest) and request.echo:
            scores = await _together([self._prompt_scores(ask) for ask in firsts])
            echoes = [
                Echo(text=self.texts.text(ask.prompt), tokens=ask.prompt, scores=score)
                for ask, score in zip(firsts, scores, strict=True)
            ]
        chat = isinstance(request, ChatRequest)
        return Wording(
            chat=chat,
            model=model,
            logprobs=LogprobWording(chat=chat, texts=self.texts, ends=self.ends),
            decode=asks[0].decode,
            prompts=[ask.prompt for ask in firsts],
            n=request.n,
            tools=[tool.function.name for tool in request.callable()] if isinstance(request, ChatRequest) else (),
            named=isinstance(request, ChatRequest) and isinstance(request.tool_choice, NamedTool),
            bound=asks[0].grammar is not None,
            echoes=echoes,
            with_prompt_ids=request.return_token_ids,
            with_usage=bool(request.stream_options and request.stream_options.include_usage),
        )

    async def _prompt_scores(self, ask: DecodeRequest) -> list[TokenScore] | None:
        if ask.top_scores is None:
            return None
        found = prompt_scores(
            self.latent.base, self.actor, ask.prompt, most=ask.top_scores, member=ask.member, allowed=ask.allowed
        )
        return await self.loop.score(found) if len(ask.prompt) > 1 else []

    def _models(self, wanted: str) -> dict[str, Any]:
        """All models, or the one of this name."""
        names = [{"id": self.limits.model}] if self.members is None else self.members.now().listed()
        about = {"object": "model", "created": self.started, "owned_by": "latent-control"}
        shape = {"num_codes": self.limits.num_actions, "code_span": self.limits.span}
        listed = [name | about | shape for name in names]
        if not wanted:
            return {"object": "list", "data": listed}
        for model in listed:
            if model["id"] == unquote(wanted):
                return model
        raise RefusedRequest(f"The model {unquote(wanted)!r:.80} does not exist", 404, "model", code="model_not_found")

    # -- rows --------------------------------------------------------------------------------------------------------

    def _row(self, ask: DecodeRequest, heard: Callable[[DecodedRow], object] | None = None) -> DecodingRow:
        """A row that ends at the request's own strings and at the model's."""
        stop = (*self.stop, *ask.stop)
        watched = bool(stop) or heard is not None
        return DecodingRow(ask=ask, stream=TextStream(self.tokenizer, stop) if watched else None, heard=heard)

    async def _decoded(self, row: DecodingRow) -> DecodedRow:
        return await self.loop.decode(row) if row.ask.max_tokens else DecodedRow(finish_reason="length")

    async def _events(self, asks: Sequence[DecodeRequest], wording: Wording) -> AsyncIterator[str]:
        """Server-sent events, as tokens come; what came since the client last read goes out together."""
        events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

        async def follow(index: int, ask: DecodeRequest) -> DecodedRow:
            state = ChoiceState()
            for event in wording.opening(index):
                events.put_nowait(event)
            row = self._row(ask, lambda part: events.put_nowait(wording.piece(index, part, state)))
            answer = await self._decoded(row)
            for event in wording.closing(index, answer, state):
                events.put_nowait(event)
            return answer

        following = asyncio.create_task(_together([follow(index, ask) for index, ask in enumerate(asks)]))
        following.add_done_callback(lambda _: events.put_nowait(None))
        try:
            ended = False
            while not ended:
                some = [await events.get()]
                while not events.empty():
                    some.append(events.get_nowait())
                ended = some[-1] is None
                if text := "".join(as_event(event) for event in some if event is not None):
                    yield text
            if wording.with_usage:
                yield as_event(wording.last(following.result()))
            following.result()
            yield "data: [DONE]\n\n"
        except RefusedRequest as refusal:  # decoding failed
            yield as_event(refusal.body())
        finally:
            following.cancel()  # where the client is gone: so are its rows


async def _together(some: Sequence[Any]) -> list[Any]:
    """The results of coroutines that run at once; when one fails or the caller is cancelled, so are all."""
    tasks = [asyncio.ensure_future(one) for one in some]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
