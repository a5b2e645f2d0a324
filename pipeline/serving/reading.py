"""Reads requests: a body, the model it asks for, its prompts' tokens, and the rows it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from latent_control.base_lm import BaseLM
from latent_control.text import encode_messages, encode_text
from pipeline.serving.grammar import GrammarMaker
from pipeline.serving.members import ServedMembers
from rollout_workers.openai_api.conversation import tools_of, turns_of, worded
from rollout_workers.openai_api.errors import RefusedRequest
from rollout_workers.openai_api.protocol import DecodeRequest, ModelLimits, decode_requests, require_bounds
from rollout_workers.openai_api.requests import ChatRequest, CompletionRequest, NamedTool, Request, parse
from rollout_workers.openai_api.tool_calls import CLOSE, OPEN, call_schema

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RequestReader:
    """``request, rows, model = reader.read(body, ChatRequest)``; may be called from any thread."""

    def __init__(
        self,
        base: BaseLM,
        tokenizer: PreTrainedTokenizerBase,
        limits: ModelLimits,
        ends: Sequence[int],
        members: ServedMembers | None,
    ) -> None:
        self.base, self.tokenizer, self.limits, self.members = base, tokenizer, limits, members
        words = base.lm.get_output_embeddings().weight.shape[0]
        self.grammars = GrammarMaker(tokenizer, words, ends)

    def read(self, body: bytes, kind: type[Request]) -> tuple[Request, list[DecodeRequest], str]:
        """The request in a body, the rows it needs, and the name of the model that answers."""
        request, limits, member, name = parse(body, kind), self.limits, None, self.limits.model
        if self.members is not None:
            name, member, banned = self.members.chosen(request)
            limits = replace(limits, banned=banned)
        asks = decode_requests(request, self._prompts(request), limits, member)
        try:
            self.base.require_steady(max(len(ask.prompt) + ask.max_tokens for ask in asks))
        except ValueError as error:
            raise RefusedRequest(str(error), param="max_tokens") from error
        if isinstance(request, CompletionRequest) and request.best_of not in (None, request.n):
            raise RefusedRequest(
                f"best_of={request.best_of} is not supported: all n={request.n} rows are returned", param="best_of"
            )
        return request, self._bound(request, asks) if isinstance(request, ChatRequest) else asks, name

    def _bound(self, request: ChatRequest, asks: list[DecodeRequest]) -> list[DecodeRequest]:
        """Rows with the grammar and the stop string that a chat asks for."""
        tools, wanted = request.callable(), request.response_format
        json_wanted = wanted is not None and wanted.type != "text"
        if request.must_call():
            if isinstance(request.tool_choice, NamedTool):
                tools = [tool for tool in tools if tool.function.name == request.tool_choice.function.name]
            if not tools:
                raise RefusedRequest("tool_choice names no function of tools: send it along", param="tool_choice")
            schema: dict[str, Any] | None = call_schema([tool.function.model_dump() for tool in tools])
            param = "tool_choice"
        elif json_wanted:
            if tools:
                raise RefusedRequest(
                    "response_format is not supported beside tools that may be called: send one of the two, or "
                    "tool_choice=none",
                    param="response_format",
                )
            assert wanted is not None
            if wanted.type == "json_schema" and (wanted.json_schema is None or wanted.json_schema.schema_ is None):
                raise RefusedRequest("response_format has no json_schema.schema", param="response_format")
            schema, param = (wanted.json_schema.schema_ if wanted.json_schema else None), "response_format"
        else:
            # A call's end is where one call at most is asked for.
            alone = tools and request.parallel_tool_calls is False
            asks = [replace(ask, stop=(*ask.stop, CLOSE)) for ask in asks] if alone else asks
            if not any(tool.function.strict for tool in tools):
                return asks
            schema = call_schema([tool.function.model_dump() for tool in tools])
            return [replace(ask, grammar=self.grammars.calls(schema, OPEN, CLOSE, "tools")) for ask in asks]
        return [replace(ask, grammar=self.grammars.json(schema, param)) for ask in asks]

    def _conversation(self, request: ChatRequest) -> list[int]:
        """Token ids by the chat template."""
        if not self.tokenizer.chat_template:
            raise RefusedRequest("the model's tokenizer has no chat template: use /v1/completions", param="messages")
        turns, tools = worded(turns_of(request), tools_of(request), str(self.tokenizer.chat_template))
        texts = [str(value) for turn in turns for value in turn.values()] + [str(tool) for tool in tools]
        require_bounds(["".join(texts)], request.n, self.limits, "messages")
        try:
            return encode_messages(self.tokenizer, turns, tools=tools)
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
