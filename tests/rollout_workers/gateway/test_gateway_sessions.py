"""How an episode's calls are joined, without a model: what was sampled is made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from configs.schema import Turns
from rollout_workers.gateway.session import EpisodeSession, SessionLimits
from rollout_workers.generated_row import Row
from rollout_workers.openai_api.errors import RefusedRequest
from rollout_workers.openai_api.requests import ChatRequest, CompletionRequest
from rollout_workers.tasks import Prompt

TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{% for m in messages %}<s>{{ m.role }} "
    "{{ m.content | trim }}{% for c in m.tool_calls or [] %} CALLS {{ c.function.name }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
ASKED = {"role": "user", "content": "2 + 2 ?"}
CALL = '<tool_call>{"name": "add",  "arguments": {"a": 2, "b": 2}}</tool_call>'


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and "ab" as one token: text that is tokenised again may become other ids."""
    letters = ["<s>", "</s>", *sorted(ByteLevel.alphabet())]
    vocabulary = {letter: place for place, letter in enumerate([*letters, "ab"])}
    made = Tokenizer(BPE(vocabulary, [("a", "b")]))
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    made.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    found = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    found.chat_template = TEMPLATE
    return found


def session(tokenizer: Any, *, stop: tuple[str, ...] = (), **limits: Any) -> EpisodeSession:
    about = SessionLimits(
        turns=Turns(**{"max_tokens": 5000, **limits}), max_new_tokens=99, max_prompt_tokens=2000, stop=stop
    )
    prompt = Prompt(id="gateway/x/train/0", text="", metadata={})
    return EpisodeSession(prompt=prompt, seed=1, limits=about, tokenizer=tokenizer, parts=())


def reply(
    one: EpisodeSession, tokenizer: Any, request: Any, said: str | list[int], *, ended: bool = True, finish: str = ""
) -> None:
    """A call, and what the policy says to it."""
    call = one.call(request)
    ids = said if isinstance(said, list) else tokenizer.encode(said, add_special_tokens=False)
    tokens = np.array([*ids, *([tokenizer.eos_token_id] if ended else [])], np.int32)
    zeros = np.zeros(len(tokens), np.int32)
    one.take(call, Row(tokens=tokens, actions=zeros, action_logp=zeros.astype(np.float32), versions=zeros,
                       finish_reason=finish or ("stop" if ended else "length")))  # fmt: skip


def chat(*messages: dict[str, Any], **more: Any) -> ChatRequest:
    return ChatRequest(messages=list(messages), **more)


def assistant(content: str | None, **calls: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **calls}


def test_a_call_and_its_result_go_on_from_the_very_tokens(tokenizer: Any) -> None:
    """The client sends the call's arguments spelt in another way, as it may; what was sampled stays."""
    one = session(tokenizer)
    reply(one, tokenizer, chat(ASKED, tools=TOOLS), CALL)
    before = list(one.ids)
    calls = [{"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"b":2,"a":2}'}}]
    result = {"role": "tool", "tool_call_id": "x", "content": "4"}
    reply(one, tokenizer, chat(ASKED, assistant(None, tool_calls=calls), result, tools=TOOLS), "4")
    assert one.problem is None and one.ids[: len(before)] == before
    assert tokenizer.decode(one.observations[0]) == "<s>tool 4</s><s>assistant "
    assert tokenizer.decode(one.ids).startswith("add <s>user 2 + 2 ?</s><s>assistant <tool_call>")
    reply(
        one, tokenizer, chat(ASKED, assistant(None, tool_calls=calls), result, assistant("4"), ASKED, tools=TOOLS), "4"
    )
    assert one.problem is None and len(one.turns) == 3


def test_tokens_that_text_would_not_give_are_kept(tokenizer: Any) -> None:
    """The policy wrote "a", "b" as two tokens; "ab" is one where a tokenizer reads it."""
    two = [*tokenizer.convert_tokens_to_ids(["a", "b"])]
    assert tokenizer.encode("ab", add_special_tokens=False) != two
    for ended in (True, False):
        one = session(tokenizer)
        reply(one, tokenizer, chat(ASKED), two, ended=ended)
        known = list(one.ids)
        reply(one, tokenizer, chat(ASKED, assistant("ab"), ASKED), "x")
        assert one.problem is None and one.ids[: len(known)] == known
        assert (one.observations[0][0] == tokenizer.eos_token_id) != ended  # closed, where the reply was cut
    plain = session(tokenizer)
    reply(plain, tokenizer, CompletionRequest(prompt="q"), two, ended=False)
    reply(plain, tokenizer, CompletionRequest(prompt="qab"), "c", ended=False)
    assert plain.problem is None and plain.observations == [[]] and tokenizer.decode(plain.ids) == "qabc"


def test_a_stop_string_that_the_client_puts_back_is_there_once(tokenizer: Any) -> None:
    """The client was shown "2 + 2" and knows its line break; what was sampled has it already."""
    for said, back in (("2 + 2\n", "\n= 4\n"), ("2 + 2\n", "= 4\n"), ("2 + 2\n= ", "\n= 4\n")):
        one = session(tokenizer, stop=("\n",))
        reply(one, tokenizer, CompletionRequest(prompt="q "), said, ended=False, finish="stop")
        reply(one, tokenizer, CompletionRequest(prompt=f"q 2 + 2{back}"), "A", ended=False)
        assert one.problem is None and one.texts == ["2 + 2", "A"]
        assert tokenizer.decode(one.ids) == "q 2 + 2\n= 4\nA"


def test_a_history_that_was_tokenised_again_is_found_by_its_ids(tokenizer: Any) -> None:
    """A client that keeps ids and makes them from text itself."""
    two = [*tokenizer.convert_tokens_to_ids(["a", "b"])]
    one = session(tokenizer)
    start = tokenizer.encode("q", add_special_tokens=False)
    reply(one, tokenizer, CompletionRequest(prompt=start), two, ended=False)
    again = tokenizer.encode("qab ?", add_special_tokens=False)
    call = one.call(CompletionRequest(prompt=again))
    assert call.seen is None and list(call.ids) == again  # answered as it was asked
    assert one.problem is not None and one.problem.kind == "history_changed"
    assert "tokenised again, differ from the sampled ones at token 1 of 3" in one.problem.message


@pytest.mark.parametrize(
    ("messages", "more", "said"),
    [
        ([ASKED], {}, "1 messages are not a continuation of 2"),
        ([assistant("ab"), ASKED], {}, "messages.0 is not what it was"),
        ([ASKED, assistant("abc"), ASKED], {}, "messages.1 is not what it was"),
        ([ASKED, assistant("ab"), ASKED], {"tools": TOOLS}, "its tools are others"),
    ],
)
def test_a_changed_history_is_named(tokenizer: Any, messages: list[Any], more: Any, said: str) -> None:
    one = session(tokenizer)
    reply(one, tokenizer, chat(ASKED), "ab")
    reply(one, tokenizer, chat(*messages, **more), "x")
    assert one.problem is not None and said in one.problem.message and len(one.turns) == 1
    assert one.calls == 2


def test_what_cannot_be_read_is_refused(tokenizer: Any) -> None:
    for prompt in ([5, len(tokenizer)], [-1]):
        with pytest.raises(RefusedRequest, match=r"the prompt has the token .*: there are 0 to 258"):
            session(tokenizer).call(CompletionRequest(prompt=prompt))
    for prompt in (["a", "b"], [[1], [2]], "", []):
        with pytest.raises(RefusedRequest, match="one prompt: a text, or ids"):
            session(tokenizer).call(CompletionRequest(prompt=prompt))
    with pytest.raises(RefusedRequest, match=r"characters are more than rollout\.turns\.max_tokens=50 can hold"):
        session(tokenizer, max_tokens=50).call(chat({"role": "user", "content": "x" * 70000}))


def test_one_call_at_a_time_and_rewards_after_it(tokenizer: Any) -> None:
    one = session(tokenizer, max_turns=1)
    with pytest.raises(RefusedRequest, match="a reward comes after a call"):
        one.reward(1.0, True, {})
    first = one.call(chat(ASKED))
    with pytest.raises(RefusedRequest, match="one after the other") as second:
        one.call(chat(ASKED))
    assert second.value.status == 409
    one.drop(first)
    reply(one, tokenizer, chat(ASKED), "ab")
    one.reward(0.5, False, {})
    one.reward(0.25, True, {})
    assert one.rewards == [0.75] and one.success
    one.reward(1e16, True, {})
    with pytest.raises(RefusedRequest, match="rewards come to 1e\\+16 at most"):
        one.reward(1e16, True, {})
    with pytest.raises(RefusedRequest, match=r"as many as rollout\.turns\.max_turns allows"):
        one.call(chat(ASKED, assistant("ab"), ASKED))
    one.close(False, "it ended")
    assert one.end == "turn_limit" and one.problem is None
    with pytest.raises(RefusedRequest):
        one.reward(1.0, True, {})
