"""A chat template before it is used: it comes with the model's files, so it is rendered within bounds first."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}
"""Names that transformers gives every template, beside the special tokens."""


def template_problem(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], *, chat: bool
) -> str | None:
    """Why the tokenizer's chat template cannot be used for a conversation like ``messages``, in the template's own
    words; ``None`` where it can. Without ``chat`` it is only asked for what ends a response, so it may fail but not
    take for ever."""
    from latent_control.bases.chat_template import bound_problem, rendering_problem

    if not tokenizer.chat_template:
        return None  # encoding says so
    whose = f"the chat template of {tokenizer.name_or_path}"
    remedy = "mend chat_template in its tokenizer_config.json (or chat_template.jinja), or set task.chat: false"
    if said := (rendering_problem if chat else bound_problem)(tokenizer, messages):
        return f"{whose} {said}; {remedy if chat else 'mend or remove it'}"
    if not chat:
        return None
    if unknown := sorted(_printed_unknowns(str(tokenizer.chat_template)) - set(tokenizer.special_tokens_map)):
        return f"{whose} writes {unknown[0]!r}, a name that nothing gives it; {remedy}"
    return None


def left_out(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> str | None:
    """What the chat template leaves out of a conversation that it renders: ``leaves out part of the system message,
    'be brief' after 0 characters``. Blanks may change, and an assistant's thoughts (up to ``</think>``) be left out."""
    from latent_control.bases.chat_template import render

    text = "".join(render(tokenizer, messages, add_generation_prompt=True, tokenize=False).split())
    for message in messages:
        said = message["content"].rpartition("</think>")[2]
        places = [place for place, char in enumerate(said) if not char.isspace()]
        whole = "".join(said.split())
        kept = bisect(range(1, len(whole) + 1), False, key=lambda length: whole[:length] not in text)
        if kept < len(whole):
            rest = said[places[kept] :][:40]
            return f"leaves out part of the {message['role']} message, {rest!r} after {places[kept]} characters"
    return None


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
