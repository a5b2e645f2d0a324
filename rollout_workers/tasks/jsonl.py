"""Rows of one's own as a task, ``jsonl``: a ``.jsonl`` file with a prompt, an answer and any metadata in each row.

Whether a row is held out is decided by a hash of its prompt, so a prompt that occurs twice is never in both splits.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rollout_workers.tasks.protocol import Demonstration, LazySequence, Prompt, Score, Split, require_split, split_of

NUMBER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,30})(?:\.[0-9]{1,30})?")
_CLOSE = 1e-6


def exact(answer: str, text: str) -> bool:
    """Whether both are the same but for blanks and case."""
    return " ".join(text.split()).casefold() == " ".join(answer.split()).casefold()


def contains(answer: str, text: str) -> bool:
    """Whether ``text`` has the answer in it as whole words, blanks and case aside."""
    wanted, found = (" ".join(t.split()).casefold() for t in (answer, text))
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", found) is not None


def number(answer: str, text: str) -> bool:
    """Whether the last number in ``text`` is the last one in ``answer``, to one part in a million."""
    wanted, found = last_number(answer), last_number(text)
    return wanted is not None and found is not None and abs(wanted - found) <= _CLOSE * max(1.0, abs(wanted))


def last_number(text: str) -> float | None:
    """``1234.5`` of ``"about 1,234.5 euros"``."""
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def pattern(answer: str, text: str) -> bool:
    """Whether the answer, read as a regular expression, is found in ``text``."""
    return re.search(answer, text) is not None


VERIFIERS: Mapping[str, Callable[[str, str], bool]] = {"exact": exact, "number": number, "contains": contains, "regex": pattern}


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonlOptions:
    """``task.options`` of jsonl."""

    path: str
    """The file; in a config, relative to it."""
    prompt: str = "prompt"
    """Key of the prompt."""
    answer: str = "answer"
    """Key of the answer, a text or a number."""
    verifier: str = "exact"
    """``exact`` (but for blanks and case), ``number`` (the last one), ``contains`` (as whole words) or ``regex`` (the answer is one)."""
    heldout_share: float = 0.2
    """Share of the prompts that is held out."""

    def __post_init__(self) -> None:
        for name in ("path", "prompt", "answer", "verifier"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"task.options.{name} of jsonl is {getattr(self, name)!r}; it must be a text")
        if self.verifier not in VERIFIERS:
            raise ValueError(f"task.options.verifier of jsonl is {self.verifier!r}; it must be one of {', '.join(VERIFIERS)}")
        share = self.heldout_share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise ValueError(f"task.options.heldout_share of jsonl is {share!r}; it must be a number between 0 and 1")


def jsonl_options(options: Mapping[str, object]) -> JsonlOptions:
    """Checked options; ``ValueError`` names what is unknown, missing or out of range."""
    known = tuple(JsonlOptions.__dataclass_fields__)
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"task.options.{key} is no option of jsonl; {hint}")
    if "path" not in options:
        raise ValueError("task.options.path of jsonl is missing; e.g. task.options: {path: data.jsonl}")
    return JsonlOptions(**options)  # type: ignore[arg-type]  # checked in __post_init__


class Jsonl:
    """The task; see the module's docstring."""

    name = "jsonl"
    parts = ("success", "answered")

    def __init__(self, options: JsonlOptions) -> None:
        self.options = options
        self._verify = VERIFIERS[options.verifier]
        self._rows: dict[str, list[dict[str, object]]] = {"train": [], "heldout": []}
        for row in read_rows(Path(options.path), options):
            self._rows[split_of(str(row["prompt"]), options.heldout_share)].append(row)
        for split, rows in self._rows.items():
            if not rows:
                raise ValueError(f"{options.path}: no row falls to the {split} split; add rows, or change task.options.heldout_share")

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The rows of the split, in the order of the file."""
        require_split(split)
        return LazySequence(len(self._rows[split]), lambda index: self._prompt(split, index))

    def demonstrations(self, split: Split) -> Sequence[Demonstration]:
        """The answers as they stand in the file."""
        prompts = self.prompts(split)
        return LazySequence(len(prompts), lambda i: Demonstration(prompt=prompts[i], response=str(prompts[i].metadata["answer"])))

    def score(self, prompt: Prompt, text: str) -> Score:
        """1 when the verifier finds the row's answer in ``text``, else 0; the part ``answered`` is 1 for any text."""
        success = self._verify(str(prompt.metadata["answer"]), text)
        return Score(reward=float(success), success=success, parts={"success": float(success), "answered": float(bool(text.strip()))})

    def _prompt(self, split: Split, index: int) -> Prompt:
        row = self._rows[split][index]
        return Prompt(id=f"{self.name}/{split}/{index}", text=str(row["prompt"]), metadata={k: v for k, v in row.items() if k != "prompt"})


def read_rows(path: Path, options: JsonlOptions) -> Iterator[dict[str, object]]:
    """Rows with the keys ``prompt`` and ``answer`` and whatever else they have; ``ValueError`` names file, line, key, remedy."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is no file; set task.options.path to a .jsonl file")
    with path.open("rb") as file:
        for count, line in enumerate(file, 1):
            if line.strip():
                yield _row(line, f"{path}, line {count}", options)


def _row(line: bytes, place: str, options: JsonlOptions) -> dict[str, object]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: no JSON in UTF-8 ({error}); mend or remove the line") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a JSON object is wanted, not {str(row)[:60]!r}; mend or remove the line")
    prompt, answer = (_value(row, key, place, name) for key, name in ((options.prompt, "prompt"), (options.answer, "answer")))
    if options.verifier == "number" and last_number(answer) is None:
        raise ValueError(f"{place}: {options.answer!r} is {answer[:60]!r} without a number; mend it, or set task.options.verifier: exact")
    if options.verifier == "regex":
        _compiles(answer, place, options.answer)
    return {k: v for k, v in row.items() if k not in (options.prompt, options.answer)} | {"prompt": prompt, "answer": answer}


def _compiles(answer: str, place: str, key: str) -> None:
    try:
        re.compile(answer)
    except re.error as error:
        raise ValueError(
            f"{place}: {key!r} is no regular expression ({error}): {answer[:60]!r}; mend it, or set verifier: exact"
        ) from error


def _value(row: Mapping[str, object], key: str, place: str, option: str) -> str:
    if key not in row:
        near = difflib.get_close_matches(key, list(row), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{place}: no key {key!r}; {hint}set task.options.{option} to one of {', '.join(map(repr, row)) or 'its keys'}")
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise ValueError(f"{place}: {key!r} is {value!r:.60}, not a text or number; mend or remove the row")
    return str(value)
