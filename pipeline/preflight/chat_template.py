"""A chat template before it is used: it comes with the model's files, so it is rendered within bounds first."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.runs.errors import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10
MEMORY = 2**30
"""Bytes that rendering one conversation may take."""
CHARACTERS = 4_000_000
"""What a conversation may become."""
BOUND = "takes more than"
GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}
"""Names that transformers gives every template, beside the special tokens."""


def template_problem(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], *, chat: bool
) -> str | None:
    """Why the tokenizer's chat template cannot be used for a conversation like ``messages``, in the template's own
    words; ``None`` where it can. Without ``chat`` it is only asked for what ends a response, so it may fail but not
    take for ever."""
    if not tokenizer.chat_template:
        return None  # encoding says so
    whose = f"the chat template of {tokenizer.name_or_path}"
    remedy = "mend chat_template in its tokenizer_config.json (or chat_template.jinja), or set task.chat: false"
    if (said := _rendered(tokenizer, messages)) is not None and (chat or said.startswith(BOUND)):
        return f"{whose} {said}; {remedy if chat else 'mend or remove it'}"
    if not chat:
        return None
    if unknown := sorted(_printed_unknowns(str(tokenizer.chat_template)) - set(tokenizer.special_tokens_map)):
        return f"{whose} writes {unknown[0]!r}, a name that nothing gives it; {remedy}"
    return None


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> str | None:
    """Render in a process of its own, which is ended when it takes too long or too much memory."""
    context = multiprocessing.get_context("fork")  # the tokenizer need not be sent
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_render, args=(tokenizer, messages, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        if not ours.poll(SECONDS):
            return f"{BOUND} {SECONDS} s for one conversation"
        said: str | None = ours.recv()
        return said
    except EOFError:
        return f"{BOUND} {MEMORY >> 20} MiB of memory for one conversation"
    finally:
        child.kill()
        child.join()
        ours.close()


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], out: Connection) -> None:
    from latent_control.text import TEMPLATE_ERRORS

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    try:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except MemoryError:
        return
    except TEMPLATE_ERRORS as error:
        out.send(f"fails: {type(error).__name__}: {first_line(error)[:300]}")
        return
    if not str(text).strip():
        out.send("gives nothing for a conversation")
    elif len(text) > CHARACTERS:
        out.send(f"{BOUND} {CHARACTERS:,} characters for one conversation")
    else:
        out.send(None)


def _printed_unknowns(template: str) -> set[str]:
    """Names that are written out though nothing sets, gives or tests them: they come out empty."""
    from jinja2 import Environment, TemplateSyntaxError, meta, nodes

    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)  # parsed, never run
    except TemplateSyntaxError:  # transformers' own tags, such as generation
        return set()
    tested = {name.name for test in _tests(tree) for name in test.find_all(nodes.Name)}
    parts = [part for output in tree.find_all(nodes.Output) for part in output.nodes]
    printed = {part.name for part in parts if isinstance(part, nodes.Name)}
    return (printed & meta.find_undeclared_variables(tree)) - tested - GIVEN


def _tests(tree: Any) -> Iterator[Any]:
    from jinja2 import nodes

    yield from tree.find_all(nodes.Test)
    yield from (choice.test for choice in tree.find_all((nodes.If, nodes.CondExpr)))
