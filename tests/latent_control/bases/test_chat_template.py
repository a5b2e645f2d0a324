"""A chat template is a program that a model brings: rendered within bounds wherever it is used, and as transformers
does it where it is harmless."""

from __future__ import annotations

import itertools
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from latent_control.bases import chat_template
from latent_control.bases.chat_template import TemplateBoundError, render
from latent_control.preference import Reading, encode
from latent_control.text import encode_messages, end_token, end_tokens, load_tokenizer

ROOT = Path(__file__).resolve().parents[3]
PLAIN = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %} "
    "{% endif %}{% endfor %}"
)
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLES = "{% set ns = namespace(x='ab') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
ENDLESS = "{% macro again() %}{% for a in [1, 2] %}{{ again() }}{% endfor %}{% endmacro %}{{ again() }}"
ONE_STEP = "{% set x = 'a' * 9**11 %}"
LATER = "{% if messages | length > 4 %}BOMB{% endif %}" + PLAIN
TURNS = [{"role": ("user", "assistant")[i % 2], "content": f"{i} + 3"} for i in range(5)]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(ROOT / "configs" / "models" / "countdown-1m")


USES: dict[str, Callable[[PreTrainedTokenizerBase], Any]] = {
    "a prompt": lambda t: encode_messages(t, TURNS),
    "a reward": lambda t: encode(t, "1 + 2", "3", Reading(chat=True)),
}


@pytest.mark.parametrize("bomb", [LOOPS, DOUBLES, ONE_STEP], ids=["loops", "doubles", "one step"])
@pytest.mark.parametrize("use", USES)
def test_what_would_not_end_is_refused_in_bounded_time_and_memory(
    tokenizer: PreTrainedTokenizerBase, use: str, bomb: str
) -> None:
    tokenizer.chat_template = bomb + PLAIN
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="takes more than"):
        USES[use](tokenizer)
    for ask in (end_tokens, lambda t: end_token(t, chat=True)):  # never another end without a word
        with pytest.raises(ValueError, match=r"the chat template of .* takes more than .*; mend or remove it"):
            ask(tokenizer)
    assert time.process_time() - begun < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB: a child took it


@pytest.mark.parametrize("bomb", [LOOPS, DOUBLES], ids=["loops", "doubles"])
def test_what_only_some_conversation_sets_off_is_bounded_too(tokenizer: PreTrainedTokenizerBase, bomb: str) -> None:
    tokenizer.chat_template = LATER.replace("BOMB", bomb)
    assert encode_messages(tokenizer, TURNS[:1])
    begun = time.process_time()
    with pytest.raises(ValueError, match="takes more than"):
        encode_messages(tokenizer, TURNS)
    assert time.process_time() - begun < 30 and sys.gettrace() is None
    assert encode_messages(tokenizer, TURNS[:3])


def test_a_macro_that_calls_itself_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = ENDLESS
    with pytest.raises(ValueError, match=r"refuses this conversation|takes more than"):
        encode_messages(tokenizer, TURNS)


def test_a_harmless_template_is_rendered_as_transformers_does(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = PLAIN
    options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False}
    long = TURNS * 400
    assert render(tokenizer, long, **options) == tokenizer.apply_chat_template(long, **options)
    # What a process above set is left as it was.
    seen: list[str] = []

    def mine(frame: Any, event: str, given: Any) -> None:
        seen.append(event)

    sys.settrace(mine)
    try:
        render(tokenizer, TURNS, **options)
        assert sys.gettrace() is mine
    finally:
        sys.settrace(None)


def test_another_template_is_looked_at_again(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = PLAIN
    assert encode_messages(tokenizer, TURNS)
    tokenizer.chat_template = ONE_STEP
    with pytest.raises(TemplateBoundError, match="MiB of memory for one conversation"):
        render(tokenizer, TURNS, tokenize=False)


def test_another_thread_s_memory_is_not_the_template_s(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = PLAIN
    wanted = tokenizer.apply_chat_template(TURNS, tokenize=False)
    here, grown = os.getpid(), itertools.count(0, chat_template.MEMORY)
    monkeypatch.setattr(chat_template, "_peak", lambda: next(grown) if os.getpid() == here else 0)
    assert render(tokenizer, TURNS, tokenize=False) == wanted


def test_there_is_no_other_way_to_a_template() -> None:
    packages = ("configs", "latent_control", "rollout_workers", "learners", "pipeline")
    calls = {
        str(path.relative_to(ROOT))
        for package in packages
        for path in (ROOT / package).rglob("*.py")
        if ".apply_chat_template(" in path.read_text().replace("``tokenizer.apply_chat_template(", "")
    }
    assert calls == {"latent_control/bases/chat_template.py"}
