"""One episode of an agent program: its calls, each of which must go on from what was sampled before.

What a program sends back is text; what is trained on are the very tokens that were sampled. A call whose messages (or
text, or ids) begin with those of the call before and the reply to it goes on from these tokens; only what is new is
tokenised. Any other call is answered too, but the episode is a failure: it says so and is not trained on.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard

from configs.schema import Turns
from latent_control.text import encode_messages, encode_text, end_tokens, spoken_text
from rollout_workers.generated_row import Row
from rollout_workers.openai_api.conversation import tools_of, turns_of, worded
from rollout_workers.openai_api.errors import RefusedRequest
from rollout_workers.openai_api.protocol import BYTES_PER_TOKEN
from rollout_workers.openai_api.requests import ChatRequest, CompletionRequest
from rollout_workers.openai_api.tool_calls import split_calls
from rollout_workers.tasks.encoding import encode_between, encode_turns
from rollout_workers.tasks.protocol import Failure, Prompt
from rollout_workers.tasks.scorers import LARGEST

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHANGED = "history_changed"
"""Kind of the failure of an episode whose calls do not go on from each other."""
_LEAST = 65536
"""Characters that are read however short episodes are: tools take some."""
Told = list[dict[str, Any]] | str | list[int]
"""What a call said: messages, a text, or ids."""


@dataclass(frozen=True, kw_only=True)
class SessionLimits:
    """Of an episode: ``rollout.turns``, ``rollout.max_new_tokens``, ``task.max_prompt_tokens``, ``rollout.stop``."""

    turns: Turns
    max_new_tokens: int
    max_prompt_tokens: int
    stop: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """A call that waits for its tokens."""

    ids: tuple[int, ...]
    limit: int
    """New tokens at most"""
    told: Told
    tools: list[dict[str, Any]]
    names: tuple[str, ...]
    """Of the functions that may be called"""
    seen: list[int] | None
    """Ids between the last response and this one; ``None``: it does not go on from that, and is not recorded"""
    answer: Future[Row] = field(default_factory=Future)


@dataclass(kw_only=True, eq=False)
class EpisodeSession:
    """An episode while it is played; its methods are called by the endpoint's thread until it is closed, ``take`` by
    the player's."""

    prompt: Prompt
    seed: int
    limits: SessionLimits
    tokenizer: PreTrainedTokenizerBase
    parts: tuple[str, ...]
    """Names of further parts of its reward"""
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    key: str = field(default_factory=lambda: f"sk-{secrets.token_urlsafe(24)}")
    ids: list[int] = field(default_factory=list)
    """Prompt, responses and observations so far"""
    prompt_length: int = 0
    opening: str = ""
    turns: list[Row] = field(default_factory=list)
    observations: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    calls: int = 0
    rewards: list[float] = field(default_factory=list)
    """Of each turn, in order"""
    rewarded: bool = False
    success: bool = False
    more: dict[str, float] = field(default_factory=dict)
    end: str = "terminated"
    problem: Failure | None = None
    told: Told | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    said: dict[str, Any] = field(default_factory=dict)
    """The last reply, as a message of the next call has it"""
    whole: str = ""
    """Its text with the stop string that it ended at"""
    open: Call | None = None
    closed: bool = False

    # -- calls -------------------------------------------------------------------------------------------------------

    def call(self, request: ChatRequest | CompletionRequest) -> Call:
        """The call that a request makes.

        Raises:
            RefusedRequest: another call is open, the episode is at a limit, or the request cannot be encoded.
        """
        if self.open is not None or self.closed:
            raise RefusedRequest("an episode's calls come one after the other: wait for the reply to the last one", 409)
        limit = min(request.limit() or self.limits.max_new_tokens, self.limits.max_new_tokens)
        told = _told(request)
        tools = tools_of(request) if isinstance(request, ChatRequest) else []
        if self.told is None:
            seen: list[int] | None = []
            ids = self._encoded(told, tools)
            self._begin(ids, told)
        else:
            seen = self._seen(told, tools)
            ids = self._encoded(told, tools) if seen is None else [*self.ids, *seen]
        self._require_room(ids, limit)
        names = tuple(tool["function"]["name"] for tool in tools)
        self.open = Call(ids=tuple(ids), limit=limit, told=told, tools=tools, names=names, seen=seen)
        return self.open

    def take(self, call: Call, row: Row) -> None:
        """Record what was sampled for a call."""
        self.open, self.calls = None, self.calls + 1
        tokens = row.tokens.tolist()
        if call.seen is not None and self.problem is None:
            if self.turns:
                self.observations.append(call.seen)
            self.turns.append(row)
            self.rewards.append(0.0)
            self.ids = [*call.ids, *tokens]
            text = spoken_text(self.tokenizer, tokens, self.limits.stop)
            self.texts.append(text.strip())
            words, calls = split_calls(text, call.names) if call.names else (text, [])
            self.told, self.tools, self.whole = call.told, call.tools, spoken_text(self.tokenizer, tokens)
            self.said = {"role": "assistant", "content": words or "", "calls": [(c.name, c.arguments) for c in calls]}

    def drop(self, call: Call) -> None:
        """A call whose client hung up: it counts for nothing, and may be made again."""
        if self.open is call:
            self.open = None

    def reward(self, reward: float, success: bool, parts: Mapping[str, float]) -> None:
        """Add to the reward of the last turn; ``RefusedRequest`` where there is none, it grows too large, or a part is
        unknown."""
        if self.closed or not self.calls:
            raise RefusedRequest("a reward comes after a call, and before the program ends", 409)
        if abs(sum(self.rewards) + reward) > LARGEST:
            raise RefusedRequest(f"an episode's rewards come to {LARGEST:g} at most", param="reward")
        if unknown := sorted(set(parts) - set(self.parts)):
            raise RefusedRequest(
                f"parts has {unknown[0]!r:.80}: task.options.parts names {', '.join(self.parts) or 'none'}",
                param="parts",
            )
        self.rewarded, self.success, self.more = True, self.success or success, {**self.more, **parts}
        if self.rewards:
            self.rewards[-1] += reward

    def close(self, late: bool, how: str) -> None:
        """The program is gone: nothing is added, and an episode without a verdict is a failure."""
        self.closed = True
        missing = [name for name in self.parts if name not in self.more]
        if self.problem is not None:
            return
        if not self.turns:
            self.problem = Failure(kind="episode_timeout" if late else "no_calls", message=f"no call was made; {how}")
        elif late and not self.rewarded:
            self.problem = Failure(kind="episode_timeout", message=how)
        elif not self.rewarded and self.end == "terminated":
            self.problem = Failure(
                kind="reward_missing", message=f"no reward came by POST /v1/sessions/{{id}}/reward; {how}"
            )
        elif missing and self.rewarded:
            self.problem = Failure(kind="reward_invalid", message=f"the reward has no part {missing[0]!r}")

    # -- what a call goes on from ------------------------------------------------------------------------------------

    def _begin(self, ids: list[int], told: Told) -> None:
        if len(ids) > self.limits.max_prompt_tokens:
            said = f"the first call has {len(ids)} tokens, more than task.max_prompt_tokens="
            self.problem = Failure(kind="prompt_too_long", message=f"{said}{self.limits.max_prompt_tokens}: raise it")
            raise RefusedRequest(self.problem.message, code="context_length_exceeded")
        self.ids, self.prompt_length = ids, len(ids)
        last = told[-1] if isinstance(told, list) and told else told
        self.opening = str(last["content"]) if isinstance(last, dict) else told if isinstance(told, str) else ""

    def _require_room(self, ids: Sequence[int], limit: int) -> None:
        turns, most = self.limits.turns.max_turns, self.limits.turns.max_tokens
        if len(self.turns) == turns:
            self.end = "turn_limit"
            raise RefusedRequest(f"the episode has had {turns} turns, as many as rollout.turns.max_turns allows")
        if len(ids) + limit > most:
            self.end = "token_limit"
            raise RefusedRequest(
                f"{len(ids)} tokens and a reply of {limit} are more than rollout.turns.max_tokens={most}",
                code="context_length_exceeded",
            )

    def _encoded(self, told: Told, tools: list[dict[str, Any]]) -> list[int]:
        size, most = len(str([told, tools])), BYTES_PER_TOKEN * self.limits.turns.max_tokens + _LEAST
        if size > most:
            raise RefusedRequest(
                f"{size} characters are more than rollout.turns.max_tokens={self.limits.turns.max_tokens} can hold",
                code="context_length_exceeded",
            )
        if isinstance(told, str):
            return encode_text(self.tokenizer, told, chat=False)
        if not _are_turns(told):
            ids = [one for one in told if isinstance(one, int)]
            if wrong := [one for one in ids if not 0 <= one < len(self.tokenizer)]:
                raise RefusedRequest(
                    f"the prompt has the token {wrong[0]}: there are 0 to {len(self.tokenizer) - 1}", param="prompt"
                )
            return ids
        if not self.tokenizer.chat_template:
            raise RefusedRequest("the model's tokenizer has no chat template: use /v1/completions", param="messages")
        turns, tools = worded(told, tools, str(self.tokenizer.chat_template))  # type: ignore[arg-type]
        try:
            return encode_messages(self.tokenizer, turns, tools=tools)
        except ValueError as error:  # the template refuses the conversation
            raise RefusedRequest(str(error), param="messages") from error

    def _seen(self, told: Told, tools: list[dict[str, Any]]) -> list[int] | None:
        """Ids of what is new behind the last response; ``None``, with the reason noted, where the call does not go on
        from it."""
        closed, before = self.ids[-1] in end_tokens(self.tokenizer), self.told
        if isinstance(told, str) and isinstance(before, str):
            for known in (before + self.whole, before + self.said["content"]):
                if told.startswith(known):
                    rest, ended = told[len(known) :], closed or self.turns[-1].finish_reason == "stop"
                    return encode_between(self.tokenizer, rest, chat=False, closed=ended) if rest else []
            return self._other(told, tools, "its text does not begin with the last prompt and reply")
        if _are_turns(told) and _are_turns(before):
            if tools != self.tools:
                return self._other(told, tools, "its tools are others")
            known = [*before, self.said]
            place = next((i for i, (a, b) in enumerate(zip(known, told, strict=False)) if not _same(a, b)), None)
            if place is None and len(told) > len(known):
                turns, _ = worded(told[len(known) :], [], str(self.tokenizer.chat_template))
                return encode_turns(self.tokenizer, turns, closed=closed)
            why = f"{len(told)} messages are not a continuation of {len(known)}"
            why = why if place is None else f"messages.{place} is not what it was"
            return self._other(told, tools, why)
        same = type(told) is type(before) and _are_turns(told) == _are_turns(before)
        return self._other(told, tools, "it differs from that" if same else "it is of another kind")

    def _other(self, told: Told, tools: list[dict[str, Any]], why: str) -> list[int] | None:
        """The same for ids, where these alone say it."""
        ids, known = self._encoded(told, tools), self.ids
        if ids[: len(known)] == known:
            return ids[len(known) :]
        place = next((i for i, (a, b) in enumerate(zip(ids, known, strict=False)) if a != b), min(len(ids), len(known)))
        self.problem = self.problem or Failure(
            kind=CHANGED,
            message=f"call {self.calls + 1} does not go on from the one before: {why}, and its ids, tokenised again, "
            f"differ from the sampled ones at token {place} of {len(known)}; send back what was replied as it is",
        )
        return None


def _told(request: ChatRequest | CompletionRequest) -> Told:
    if isinstance(request, ChatRequest):
        return turns_of(request)
    prompt = request.prompt
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]  # type: ignore[assignment]
    if (isinstance(prompt, list) and not all(isinstance(one, int) for one in prompt)) or not prompt:
        raise RefusedRequest("an episode's call has one prompt: a text, or ids", param="prompt")
    return prompt  # type: ignore[return-value]


def _are_turns(told: Told | None) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(told, list) and bool(told) and isinstance(told[0], dict)


def _same(known: Mapping[str, Any], turn: Mapping[str, Any]) -> bool:
    """Whether a message is the one that was: role, words (but for spaces around them), calls."""
    return known["role"] == turn["role"] and known["content"].strip() == turn["content"].strip() and (
        _called(known) == _called(turn)
    )  # fmt: skip


def _called(turn: Mapping[str, Any]) -> list[tuple[str, Any]]:
    if "calls" in turn:
        return [(name, json.loads(arguments)) for name, arguments in turn["calls"]]
    return [(call["function"]["name"], call["function"]["arguments"]) for call in turn.get("tool_calls", ())]
