"""Writes math_verify.json: math-verify's own test cases, with the version that they are of and what that version says.

Run in a checkout of github.com/huggingface/Math-Verify, in an environment that has math-verify installed:
``python write_math_verify.py CHECKOUT > math_verify.json``. The cases are read off the test files' syntax trees; a
case counts where the installed version itself gives the value that the test expects.
"""

from __future__ import annotations

import ast
import json
import sys
from importlib.metadata import version
from pathlib import Path

from math_verify import parse, verify

FILES = ("test_all.py", "test_boxed.py", "test_numina_cases.py", "test_open_thoughts.py", "test_yujianll.py")
DEFAULT = "parse, verify with their defaults"


def cases(file: Path) -> list[tuple[str, str, int]]:
    """(gold, response, expected) of every parametrised test of three or more such values."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef) or "allow_set_relation_comp" in ast.unparse(node):
            continue
        for marker in node.decorator_list:
            if isinstance(marker, ast.Call) and len(marker.args) == 2 and isinstance(marker.args[1], ast.List):
                for case in marker.args[1].elts:
                    try:
                        value = ast.literal_eval(case)
                    except ValueError:
                        continue
                    if len(value) >= 3 and [type(v) for v in value[:3]] == [str, str, int]:
                        found.append(value[:3])
    return found


def main() -> None:
    """Print the file."""
    every = [case for name in FILES for case in cases(Path(sys.argv[1]) / "tests" / name)]
    held = [case for case in dict.fromkeys(every) if int(verify(parse(case[0]), parse(case[1]))) == case[2]]
    said = {
        "peer": "math-verify",
        "version": version("math-verify"),
        "judged_by": DEFAULT,
        "cases_in_its_tests": len(set(every)),
        "cases": [{"gold": gold, "response": response, "right": bool(right)} for gold, response, right in held],
    }
    json.dump(said, sys.stdout, indent=1, ensure_ascii=False)
    print()


main()
