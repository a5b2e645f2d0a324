"""Tools of a model: the JSON schemas of plain Python functions by their type hints, and calls of them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ArgsKwargs

LONGEST_RESULT = 16 << 10
"""Characters of a result; the rest is cut off."""


class ToolFunctions:
    """``ToolFunctions({"add": add}).call({"a": 1, "b": 2}, "add")``

    Raises:
        TypeError: one cannot be called, is async, or has a parameter without a type hint.
    """

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        self._adapters: dict[str, TypeAdapter[Any]] = {}
        self.schemas = []
        """Of each, as OpenAI's protocol has them"""
        for name, function in functions.items():
            if not callable(function) or inspect.iscoroutinefunction(function):
                raise TypeError(f"{name} is not a plain function; write def {name}(...)")
            given = inspect.signature(function).parameters.items()
            bare = [one for one, about in given if about.annotation is about.empty]
            if bare:
                raise TypeError(f"the parameter {bare[0]} of {name} has no type hint; write e.g. {bare[0]}: int")
            self._adapters[name] = TypeAdapter[Any](function)  # type: ignore[arg-type]
            about = {"name": name, "description": inspect.cleandoc(function.__doc__ or "")}
            parameters = self._adapters[name].json_schema()
            self.schemas.append({"type": "function", "function": {**about, "parameters": parameters}})

    def call(self, arguments: Mapping[str, Any], name: str) -> str:
        """What the tool returns, as a text: as it is, or as JSON. ``ValueError`` where the arguments do not fit."""
        try:
            result = self._adapters[name].validate_python(ArgsKwargs((), dict(arguments)))
        except ValidationError as error:
            said = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:3])
            raise ValueError(said) from None
        text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
        return text[:LONGEST_RESULT]
