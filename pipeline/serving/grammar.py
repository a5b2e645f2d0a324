"""Grammars that bind what a row may write: JSON, or JSON of a schema, by ``llguidance``.

The engine masks the world model's tokens with them (``TokenGrammar``); the policy then chooses among the codes that
remain.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from configs.install import install_command
from rollout_workers.openai_api.errors import RefusedRequest

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase

_OBJECT = {"type": "object"}
_KEPT = 64
"""Compiled grammars that are remembered."""


class GrammarMaker:
    """``GrammarMaker(tokenizer, vocabulary, ends).json({"type": "object"}, "response_format")``"""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: Sequence[int]) -> None:
        self.tokenizer, self.vocabulary, self.ends = tokenizer, vocabulary, list(ends)
        self._compiled = lru_cache(maxsize=_KEPT)(self._compile)
        self._tokens: LLTokenizer | None = None

    def json(self, schema: Mapping[str, Any] | None, param: str) -> Grammar:
        """A grammar of JSON texts that ``schema`` allows (``None``: objects).

        Raises:
            RefusedRequest: the schema cannot be held to, the tokenizer cannot spell JSON, or there is no llguidance.
        """
        return self._made(_OBJECT if schema is None else schema, param)

    def calls(self, schema: Mapping[str, Any], begin: str, end: str, param: str) -> Grammar:
        """A grammar of any text in which what stands between ``begin`` and ``end`` is JSON that ``schema`` allows.

        Raises:
            RefusedRequest: as ``json``.
        """
        return self._made(schema, param, begin, end)

    def _made(self, schema: Mapping[str, Any], param: str, begin: str = "", end: str = "") -> Grammar:
        matcher = self._compiled(json.dumps(schema), param, begin, end)
        return Grammar(matcher.deep_copy(), self.vocabulary, self.ends)

    def _compile(self, schema: str, param: str, begin: str, end: str) -> LLMatcher:
        try:
            from llguidance import LLMatcher, StructTag
        except ImportError as error:
            raise RefusedRequest(
                f"{param} needs llguidance, which is not installed on the server: {install_command('serve')}",
                param=param,
            ) from error
        try:
            if begin:
                special = begin in self.tokenizer.get_added_vocab()
                tag = StructTag(trigger=begin, begin=f"{begin}\n", grammar=schema, end=f"\n{end}")
                grammar = LLMatcher.grammar_from_lark(StructTag.to_grammar([tag], assume_special=special))
            else:
                grammar = LLMatcher.grammar_from_json_schema(schema)
        except ValueError as error:
            raise RefusedRequest(f"{param} has a schema that cannot be held to: {error}", param=param) from error
        matcher = LLMatcher(self._own_tokens(param), grammar, log_level=0)
        if matcher.is_error():
            said = " ".join(matcher.get_error().split())
            raise RefusedRequest(f"{param} has a schema that cannot be held to: {said[:300]}", param=param)
        if not begin:
            Grammar(matcher.deep_copy(), self.vocabulary, self.ends).require_tokens(param)
        return matcher

    def _own_tokens(self, param: str) -> LLTokenizer:
        if self._tokens is None:
            from llguidance.hf import from_tokenizer

            try:
                self._tokens = from_tokenizer(self.tokenizer, self.vocabulary, self.ends)  # type: ignore[arg-type]
            except ValueError as error:
                said = " ".join(str(error).split())[:200]
                raise RefusedRequest(
                    f"{param} is not supported: the model's tokenizer does not spell texts byte by byte ({said})",
                    param=param,
                ) from error
        return self._tokens


class Grammar:
    """Where one row stands in a grammar."""

    def __init__(self, matcher: LLMatcher, vocabulary: int, ends: Sequence[int]) -> None:
        self.matcher, self.vocabulary, self.ends = matcher, vocabulary, list(ends)

    def allowed(self) -> torch.Tensor:
        """bool [V]: the tokens that may come next."""
        if not self.matcher.is_stopped():
            given = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8)
            mask = torch.zeros(self.vocabulary, dtype=torch.bool)
            mask[: len(given)] = given[: self.vocabulary] > 0
            if bool(mask[self.ends].any()):
                mask[self.ends] = True
            if bool(mask.any()):
                return mask
        return torch.zeros(self.vocabulary, dtype=torch.bool).index_fill(0, torch.tensor(self.ends), True)

    def take(self, token: int) -> bool:
        """Go on behind a token; whether nothing can follow it."""
        if token in self.ends:
            return True
        self.matcher.consume_token(token)
        return bool(self.matcher.is_stopped())

    def require_tokens(self, param: str) -> None:
        """``RefusedRequest`` where the vocabulary has no token to begin with."""
        if bool(self.allowed()[self.ends].any()):
            raise RefusedRequest(
                f"{param} is not supported: the model's vocabulary cannot spell such a text", param=param
            )
