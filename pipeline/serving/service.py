"""A served export: requests in, replies out, decoding in batches. Ray Serve calls it (``pipeline/serving/deploy.py``),
tests do so without Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from latent_control.auto import LatentActionForCausalLM
from latent_control.auto_generation import decoding_of
from latent_control.decoding.generate import generate
from latent_control.decoding.guide import make_guide
from latent_control.decoding.prefix_tree import PrefixTree
from latent_control.decoding.sampling_params import SamplingParams
from latent_control.model import latent_actor
from latent_control.records import Generation
from latent_control.text import config_ends, encode_messages, encode_text, left_padded, load_tokenizer, spoken_text
from pipeline.serving.bank import WORLD, is_bank
from pipeline.serving.members import ServedMembers
from pipeline.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DecodedRow,
    DecodeRequest,
    ModelLimits,
    RefusedRequest,
    Request,
    TextStream,
    Wording,
    decode_requests,
    parse,
    require_bounds,
)

Event = tuple[int, str, DecodedRow] | None
"""Row, its new text, its new tokens and codes; ``None``: no more of any row."""


@dataclass(kw_only=True)
class DecodingRow:
    """A row on its way: what is asked, and who is to hear of each token."""

    ask: DecodeRequest
    stream: TextStream | None
    """``None``: nobody looks at the text before the end"""
    heard: Callable[[str, DecodedRow], None] | None = None
    sent: int = 0

    def push(self, token: int, code: int) -> bool:
        """Take a token; whether the row ends with it."""
        if self.stream is None:
            return False
        self.stream.push(token)
        if self.heard is not None:
            self.heard(self.fresh(self.stream.safe()), DecodedRow(tokens=[token], codes=[code]))
        return self.stream.stopped

    def fresh(self, text: str) -> str:
        """What of ``text`` was not sent yet."""
        new, self.sent = text[self.sent :], max(self.sent, len(text))
        return new


PREFIX_CACHE_MB = 512
"""What a replica keeps of prompts over requests and users."""

Decode = Callable[[DecodingRow], Awaitable[DecodedRow]]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Status and body: JSON, or events."""

    status: int
    body: dict[str, Any] | AsyncIterator[str]


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
    ) -> None:
        """``folder``: an export, or a bank, whose members are served; ``decode``: where a request does not say;
        ``None``: the export's own."""
        bank, folder = (folder, folder / WORLD) if is_bank(folder) else (None, folder)
        model = LatentActionForCausalLM.from_pretrained(
            folder, base=base, device_map=device or "auto", trust_remote_code=False
        )
        self.latent = model.latent
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

    # -- requests ----------------------------------------------------------------------------------------------------

    async def respond(self, method: str, path: str, body: bytes, decode_row: Decode) -> Reply:
        """The reply to one HTTP request; ``decode_row`` collects rows into batches."""
        try:
            return await self._respond(method, path.rstrip("/"), body, decode_row)
        except RefusedRequest as refusal:
            return Reply(status=refusal.status, body=refusal.body())

    async def _respond(self, method: str, path: str, body: bytes, decode_row: Decode) -> Reply:
        kinds: dict[str, type[Request]] = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest}
        pages: dict[str, Callable[[], dict[str, Any]]] = {
            "/health": lambda: {"status": "ok"},
            "/v1/models": self._models,
        }
        if path not in kinds and path not in pages:
            raise RefusedRequest(f"there is nothing at {path or '/'}; there are {', '.join([*kinds, *pages])}", 404)
        if method != (needed := "GET" if path in pages else "POST"):
            raise RefusedRequest(f"{path} takes {needed}, not {method}", 405)
        if path in pages:
            return Reply(status=200, body=await asyncio.to_thread(pages[path]))
        # In a thread: others are read, and health checks answered, while a long text is tokenised.
        request, asks, model = await asyncio.to_thread(self._asks, body, kinds[path])
        wording = Wording(chat=isinstance(request, ChatRequest), model=model)
        if request.stream:
            return Reply(status=200, body=self._events(asks, wording, decode_row))
        answers = await asyncio.gather(*(decode_row(self._row(ask)) for ask in asks))
        return Reply(status=200, body=wording.whole(answers, sum(len(ask.prompt) for ask in asks[:: request.n])))

    def _asks(self, body: bytes, kind: type[Request]) -> tuple[Request, list[DecodeRequest], str]:
        """The request in a body, the rows it needs, and the name of the model that answers."""
        request, limits = parse(body, kind), self.limits
        if self.members is None:
            return request, decode_requests(request, self._prompts(request), limits), limits.model
        name, member, banned = self.members.chosen(request)
        limits = replace(limits, banned=banned)
        return request, decode_requests(request, self._prompts(request), limits, member), name

    def _models(self) -> dict[str, Any]:
        names = [{"id": self.limits.model}] if self.members is None else self.members.now().listed()
        shape = {"num_codes": self.limits.num_actions, "code_span": self.limits.span}
        about = {"object": "model", "owned_by": "latent-control"}
        return {"object": "list", "data": [name | about | shape for name in names]}

    def _conversation(self, request: ChatRequest) -> list[int]:
        """Token ids by the chat template."""
        if not self.tokenizer.chat_template:
            raise RefusedRequest("the model's tokenizer has no chat template: use /v1/completions", param="messages")
        turns = [message.model_dump() for message in request.messages]
        require_bounds(["".join(turn["role"] + turn["content"] for turn in turns)], request.n, self.limits, "messages")
        try:
            return encode_messages(self.tokenizer, turns)
        except ValueError as error:  # the template refuses the conversation
            raise RefusedRequest(str(error), param="messages") from error

    def _prompts(self, request: Request) -> list[list[int]]:
        """Token ids of each prompt."""
        if isinstance(request, ChatRequest):
            return [self._conversation(request)]
        assert isinstance(request, CompletionRequest)
        given: Any = request.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        require_bounds(given, request.n, self.limits, "prompt")
        return [
            encode_text(self.tokenizer, item, chat=False) if isinstance(item, str) else list(item) for item in given
        ]

    def _row(self, ask: DecodeRequest, heard: Callable[[str, DecodedRow], None] | None = None) -> DecodingRow:
        """A row that ends at the request's own strings and at the model's."""
        stop = (*self.stop, *ask.stop)
        watched = bool(stop) or heard is not None
        return DecodingRow(ask=ask, stream=TextStream(self.tokenizer, stop) if watched else None, heard=heard)

    async def _events(self, asks: Sequence[DecodeRequest], wording: Wording, decode_row: Decode) -> AsyncIterator[str]:
        """Server-sent events, as tokens come."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def listener(index: int) -> Callable[[str, DecodedRow], None]:
            def heard(text: str, part: DecodedRow) -> None:  # in the decoding thread
                loop.call_soon_threadsafe(events.put_nowait, (index, text, part))

            return heard

        async def follow(index: int, row: DecodingRow) -> None:
            answer = await decode_row(row)
            events.put_nowait((index, row.fresh(answer.text), DecodedRow(finish_reason=answer.finish_reason)))

        async def follow_all() -> None:
            try:
                await asyncio.gather(
                    *(follow(index, self._row(ask, listener(index))) for index, ask in enumerate(asks))
                )
            finally:
                events.put_nowait(None)

        following = asyncio.create_task(follow_all())
        while (event := await events.get()) is not None:
            yield f"data: {json.dumps(wording.piece(*event))}\n\n"
        await following  # raises what went wrong: the connection then breaks without the last line
        yield "data: [DONE]\n\n"

    # -- decoding ----------------------------------------------------------------------------------------------------

    def decode(self, rows: Sequence[DecodingRow]) -> list[DecodedRow]:
        """Decode a batch. Rows are the same whoever their neighbours are."""
        places = sorted(range(len(rows)), key=lambda place: _kind(rows[place].ask))
        answers: dict[int, DecodedRow] = {}
        for _, group in groupby(places, key=lambda place: _kind(rows[place].ask)):
            together = list(group)
            answers |= dict(zip(together, self._decode_alike([rows[place] for place in together]), strict=True))
        return [answers[place] for place in range(len(rows))]

    def _decode_alike(self, rows: Sequence[DecodingRow]) -> list[DecodedRow]:
        """Rows of one temperature, top-k and way of decoding."""
        asks, device, shape = [row.ask for row in rows], self.latent.base.lm.device, self.latent.config
        codes, allowed = [ask.codes for ask in asks], [ask.allowed for ask in asks]
        guide = make_guide(
            codes, allowed, rows=len(asks), num_actions=shape.num_actions, span=shape.span, device=device
        )

        def watch(numbers: list[int], tokens: list[int], chosen: list[int]) -> list[bool]:
            return [rows[number].push(token, code) for number, token, code in zip(numbers, tokens, chosen, strict=True)]

        params = SamplingParams(
            max_new_tokens=[ask.max_tokens for ask in asks],
            temperature=asks[0].temperature,
            top_k=asks[0].top_k,
            **self.decoding | {"decode": asks[0].decode},
            stop_token=self.ends,
            row_seeds=[ask.seed for ask in asks],
            guide=guide if any(row is not None for row in (*codes, *allowed)) else None,
            members=[ask.member for ask in asks if ask.member is not None] or None,
            watch=watch if any(row.stream is not None for row in rows) else None,
            keep_responses=True,  # a conversation goes on from them
        )
        out = generate(
            self.latent.base,
            self.actor,
            params,
            *left_padded([ask.prompt for ask in asks], device),
            tree=self.tree,
        )
        return [self._answer(row, out, index) for index, row in enumerate(rows)]

    def _answer(self, row: DecodingRow, out: Generation, index: int) -> DecodedRow:
        length = int(out.lengths[index])
        tokens = out.tokens[index, :length].tolist()
        return DecodedRow(
            text=row.stream.text if row.stream is not None else spoken_text(self.tokenizer, tokens),
            tokens=tokens,
            codes=out.actions[index, :length].tolist(),
            code_logp=out.action_logp[index, :length].tolist(),
            finish_reason=out.finish_reasons[index],
        )


def _kind(ask: DecodeRequest) -> tuple[float, int, str]:
    return ask.temperature, ask.top_k or 0, ask.decode
