"""An ``eval`` for verifiers that evaluate responses: expressions of numbers, lists and functions of sympy's; code is
refused.

reasoning-gym evaluates an answer itself, or has sympy's parser do it. Both get ``Guard.evaluate`` in the place of
``eval``: it reads the syntax tree first, and what can reach beyond a value (attributes, lambdas, assignments, Python's
own functions but the harmless ones) never runs. It is no wall, those stand around the process: it keeps an answer from
making up its own verdict inside them.
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Callable, Mapping
from functools import partial
from types import CodeType, ModuleType
from typing import Any

_NODES: tuple[type[ast.AST], ...] = (
    *(
        ast.Expression,
        ast.Constant,
        ast.Name,
        ast.Load,
        ast.Store,
        ast.Call,
        ast.keyword,
        ast.Starred,
        ast.Subscript,
        ast.Slice,
        ast.IfExp,
    ),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
    *(
        ast.Tuple,
        ast.List,
        ast.Set,
        ast.Dict,
        ast.ListComp,
        ast.SetComp,
        ast.DictComp,
        ast.GeneratorExp,
        ast.comprehension,
    ),
)
_BUILTINS = (
    "abs all any bool complex dict divmod enumerate filter float frozenset int len list map max min pow range reversed "
    "round set sorted str sum tuple zip"
)
_SYMPY = (
    *("S", "sympify", "sqrt", "cbrt", "root", "real_root", "expand", "simplify", "factor", "diff", "integrate"),
    *("together", "apart", "cancel", "prod", "Function", "Lambda", "collect", "nsimplify", "trigsimp", "powsimp"),
    *("ratsimp", "radsimp", "horner", "N"),
)
_COMPILERS = (
    *("importlib._bootstrap", "importlib._bootstrap_external", "ast", "collections", "dataclasses"),
    "sympy.polys.monomials",
)
"""Modules that compile and execute nothing that an answer has a word in: imports, syntax trees, records, and sums over
exponents, whose source has numbered names."""
_SAFE: Mapping[str, Any] = {name: getattr(builtins, name) for name in _BUILTINS.split()}


class Refused(Exception):
    """The answer is code."""


class Guard:
    """Stands for ``eval`` in the modules it is put into; ``refused`` keeps what was refused, for verifiers that catch
    everything."""

    def __init__(self) -> None:
        self.refused = ""
        self._real, self._compile = builtins.eval, builtins.compile
        self._checked: list[CodeType] = []
        self._closed = False
        self._sympy: dict[str, Any] = {}

    def install(self, package: str) -> None:
        """Into the loaded modules of ``package``."""
        for name, module in list(sys.modules.items()):
            if name == package or name.startswith(package + "."):
                self._put(module)

    def close(self) -> None:
        """In a fork: no module evaluates, compiles or executes any more, by whatever way an answer comes to it.

        sympy writes source with the names that an answer gives to its symbols, and executes it to evaluate a sum.
        """
        if self._closed:
            return
        self._closed = True
        for name in ("eval", "compile", "exec"):
            setattr(builtins, name, partial(self._ask, getattr(builtins, name), name))

    def _ask(self, real: Callable[..., Any], name: str, /, *arguments: Any, **settings: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__")
        if caller not in _COMPILERS:
            self._refuse(f"{name} in {caller}")
        return real(*arguments, **settings)

    def _put(self, module: ModuleType) -> None:
        for name, function in (("eval", self.evaluate), ("compile", self.compile), ("exec", self.execute)):
            if name not in vars(module):  # reasoning-gym has a compiler of its own
                setattr(module, name, function)

    def evaluate(
        self, source: Any, names: dict[str, Any] | None = None, local: Mapping[str, Any] | None = None, /
    ) -> Any:
        """The value of an expression. A name that the caller has is known only where the caller says so (sympy's parser
        does)."""
        if isinstance(source, CodeType):
            if not any(source is known for known in self._checked):
                self._refuse("compiled code")
            self._checked.clear()
            return self._real(source, names, local)
        tree = ast.parse(source.strip() if isinstance(source, str) else source, mode="eval")
        known = _SAFE if names is None else names
        self._check(tree, known, local or {})
        code = self._compile(tree, "<answer>", "eval")
        return self._real(code, {"__builtins__": {}, **known}) if names is None else self._real(code, names, local)

    def compile(self, source: Any, name: str, mode: str) -> CodeType:
        """``compile`` of a syntax tree of sympy's parser, to be evaluated once."""
        if mode != "eval" or not isinstance(source, ast.AST):
            self._refuse(f"compile in mode {mode}")
        self._check(source, vars(sys.modules["sympy"]), {})
        code: CodeType = self._compile(source, name, mode)
        self._checked.append(code)
        return code

    def execute(self, source: Any, names: dict[str, Any]) -> None:
        """``exec`` of the one line that sympy's parser has executed for each text, which takes longer than all else:
        its names are kept."""
        if source != "from sympy import *":
            self._refuse("statements")
        if not self._sympy:
            sympy = sys.modules["sympy"]
            self._sympy = {name: getattr(sympy, name) for name in sympy.__all__}
        names.update(self._sympy)

    def _check(self, tree: ast.AST, names: Mapping[str, Any], local: Mapping[str, Any]) -> None:
        nodes = list(ast.walk(tree))
        kinds = {type(node) for node in nodes}
        if other := next((kind for kind in kinds if not issubclass(kind, _NODES)), None):
            self._refuse(other.__name__)
        for name in {node.id for node in nodes if isinstance(node, ast.Name)}:
            # Without a call a function is just a name.
            if name.startswith("__") or (ast.Call in kinds and not _harmless(name, local, names)):
                self._refuse(f"the name {name}")

    def _refuse(self, what: str) -> None:
        self.refused = what
        raise Refused(f"the answer is code ({what}), which is not run")


def _harmless(name: str, local: Mapping[str, Any], names: Mapping[str, Any]) -> bool:
    """Values; Python's functions on values; sympy's on expressions; sympy's expressions and their classes."""
    value = local[name] if name in local else names.get(name, getattr(builtins, name, None))
    if not callable(value):
        return not isinstance(value, ModuleType)
    if value is _SAFE.get(name) or (name in _SYMPY and value is getattr(sys.modules.get("sympy"), name, None)):
        return True
    kind = value if isinstance(value, type) else type(value)
    return kind.__module__.startswith("sympy.") and any(base.__name__ == "Basic" for base in kind.__mro__)
