"""A steered policy and its page on a real port, shared by the tests of steering."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from explorer_data import HOSTILE

from pipeline.steering.loading import load
from pipeline.steering.steerer import Steerer
from pipeline.steering.web import application
from pipeline.web.guard import new_token
from pipeline.web.server import address_of, listen, server_of


class HostileWords:
    """The tokenizer of a model whose vocabulary holds hostile texts."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._tokenizer(*arguments, **named)

    def decode(self, tokens: list[int], **named: Any) -> str:
        """As the tokenizer, with more at the end."""
        return self._tokenizer.decode(tokens, **named) + HOSTILE


@pytest.fixture(scope="session")
def steerer(explored_run: Path) -> Steerer:
    """8 codes on countdown, span 1, 6 tokens."""
    return Steerer(load(explored_run))


@pytest.fixture(scope="session")
def hostile_steerer(steerer: Steerer) -> Steerer:
    """The same with hostile texts wherever a text comes from: vocabulary, prompts, name, note."""
    loaded = steerer.loaded
    prompts = tuple(replace(prompt, text=f"{prompt.text} {HOSTILE}") for prompt in loaded.prompts[:3])
    return Steerer(
        replace(loaded, tokenizer=HostileWords(loaded.tokenizer), prompts=prompts, name=HOSTILE, note=HOSTILE)
    )


@pytest.fixture(scope="session")
def serving() -> Iterator[Callable[[Steerer], str]]:
    """``serving(steerer)``: the address of its page without the last slash, up until the session ends."""
    started = []

    def serve(some: Steerer) -> str:
        listener, token = listen("127.0.0.1", None), new_token()
        server = server_of(application(some, "127.0.0.1", token))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        started.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        return address_of(listener, token).removesuffix("/")

    yield serve
    for server, thread in started:
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="session")
def page_address(serving: Callable[[Steerer], str], steerer: Steerer) -> str:
    """Where the page of ``steerer`` is."""
    return serving(steerer)
