"""Renders chat templates within bounds: a template is a program that comes with a model's files.

``render`` is the only way to one. Before a process uses a template, it renders a short conversation in a process of its
own, which is ended when it takes too long or too much memory; after that each rendering is counted line by line.
"""

from __future__ import annotations

import multiprocessing
import resource
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10
"""Of a processor; of the clock it may be more where others use the machine."""
PATIENCE = 120.0
MEMORY = 2**30
"""Bytes that rendering one conversation may take."""
CHARACTERS = 4_000_000
"""What a conversation may become."""
STEPS = 300_000
"""Lines of a template, those of loops each time."""
BOUND = "takes more than"
TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""What rendering a chat template can raise."""
_TEMPLATE = "<template>"
"""File name of jinja's compiled code."""
_SHORT = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}, {"role": "user", "content": "?"})

Messages = Sequence[Mapping[str, Any]]


class TemplateBoundError(ValueError):
    """A chat template takes more than a conversation can need."""


class _Grown(TemplateBoundError):
    """This process took more memory while a template was rendered."""


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, **options: Any) -> Any:
    """``tokenizer.apply_chat_template(messages, **options)`` within bounds.

    Raises:
        TemplateBoundError: the template takes too long, or too much memory.
        TEMPLATE_ERRORS: it fails.
    """
    if said := _short_of(tokenizer, str(tokenizer.chat_template)):
        raise TemplateBoundError(said)
    try:
        return _counted(tokenizer, messages, options)
    except _Grown as error:  # by the template, or by another thread of this process
        if said := bound_problem(tokenizer, messages):
            raise TemplateBoundError(said) from error
        return tokenizer.apply_chat_template(list(messages), **options)


def bound_problem(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str | None:
    """Why no process should render these messages: ``takes more than 10 s for one conversation``."""
    said = rendering_problem(tokenizer, messages)
    return said if said is not None and said.startswith(BOUND) else None


def rendering_problem(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str | None:
    """What is wrong with the template for ``messages``, rendered in a process of its own; ``None``: nothing is."""
    context = multiprocessing.get_context("fork")  # the tokenizer need not be sent
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_render, args=(tokenizer, messages, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        said: str | None = ours.recv() if ours.poll(PATIENCE) else f"{BOUND} {PATIENCE:g} s for one conversation"
        return said
    except EOFError:
        child.join(PATIENCE)
        much = f"{SECONDS} s" if child.exitcode == -signal.SIGXCPU else f"{MEMORY >> 20} MiB of memory"
        return f"{BOUND} {much} for one conversation"
    finally:
        child.kill()
        child.join()
        ours.close()


@lru_cache(maxsize=16)
def _short_of(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """``bound_problem`` of a short conversation; ``template`` says whether it is still so."""
    return bound_problem(tokenizer, _SHORT)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, out: Connection) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    try:
        text = _counted(tokenizer, messages, {"add_generation_prompt": True, "tokenize": False})
    except (MemoryError, _Grown):
        return
    except TemplateBoundError as error:
        out.send(str(error))
        return
    except TEMPLATE_ERRORS as error:
        said = str(error).partition("\n")[0] or type(error).__name__
        out.send(f"fails: {type(error).__name__}: {said[:300]}")
        return
    if not str(text).strip():
        out.send("gives nothing for a conversation")
    elif len(text) > CHARACTERS:
        out.send(f"{BOUND} {CHARACTERS:,} characters for one conversation")
    else:
        out.send(None)


def _counted(tokenizer: PreTrainedTokenizerBase, messages: Messages, options: Mapping[str, Any]) -> Any:
    with _steps():
        return tokenizer.apply_chat_template(list(messages), **options)


@contextmanager
def _steps() -> Iterator[None]:
    """Count the lines that templates run in this thread, and look at the memory at each: a text that doubles is
    gigabytes after thirty."""
    steps, peak, before = 0, _peak() + MEMORY, sys.gettrace()

    def line(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > STEPS:
            raise TemplateBoundError(f"{BOUND} {STEPS:,} steps for one conversation")
        if _peak() > peak:
            raise _Grown(f"{BOUND} {MEMORY >> 20} MiB of memory for one conversation")
        return line

    sys.settrace(lambda frame, event, given: line if frame.f_code.co_filename == _TEMPLATE else None)
    try:
        yield
    finally:
        sys.settrace(before)


def _peak() -> int:
    """Of this process's memory, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
