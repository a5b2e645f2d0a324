"""``latent-control init``: a config for a user's own rows: keys, verifier and lengths are inferred from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from configs.yaml_text import write
from pipeline.preflight.data_sources import SAMPLES
from rollout_workers.judging.numerals import number_of
from rollout_workers.tasks.row_files import near, read_file

ENOUGH = 10_000
"""Rows that are read."""
PROMPTS = ("prompt", "question", "problem", "input", "instruction", "query", "text")
ANSWERS = ("answer", "solution", "target", "output", "response", "completion", "label")
FEWEST = 20
"""With fewer, the held-out fifth is too small for a result."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """``Found(path=Path("rows.jsonl"), rows=200, prompt="question", answer="answer", verifier="number", longest="39",
    slices=())``"""

    path: Path
    rows: int
    prompt: str
    answer: str
    verifier: str
    longest: str
    """The answer with the most characters."""
    slices: tuple[str, ...]
    """Other keys with few different values, by which success is reported."""


def look(path: Path, prompt: str | None = None, answer: str | None = None) -> Found:
    """The keys, verifier and slices that fit the rows of a ``.jsonl`` or ``.parquet`` file.

    Raises:
        ValueError: no such file, a broken row, too few rows, or no key for the prompt or the answer; names the keys.
    """
    rows = [row for _, row in islice(read_file(path), ENOUGH)]
    if len(rows) < FEWEST:
        raise ValueError(f"{path} has {len(rows)} rows; give at least {FEWEST}: a fifth of them is held out")
    keys = [key for key in rows[0] if all(row.get(key) is not None for row in rows)]
    prompt_key, answer_key = _key("prompt", prompt, PROMPTS, keys), _key("answer", answer, ANSWERS, keys)
    answers = [str(row[answer_key]) for row in rows]
    return Found(
        path=path,
        rows=len(rows),
        prompt=prompt_key,
        answer=answer_key,
        verifier="number" if all(number_of(text) is not None for text in answers) else "exact",
        longest=max(answers, key=len),
        slices=tuple(
            key
            for key in keys
            if key not in (prompt_key, answer_key) and 2 <= len({str(row[key]) for row in rows}) <= 8
        ),
    )


def _key(kind: str, given: str | None, known: Sequence[str], keys: Sequence[str]) -> str:
    if given is not None:
        if given not in keys:
            raise ValueError(f"--{kind}-key {given}: not every row has it; {near(given, keys)}")
        return given
    found = next((name for name in known if name in keys), None)
    if found is None:
        raise ValueError(
            f"which key holds the {kind}? Rows have {', '.join(keys) or 'no common key'}; name it with --{kind}-key KEY"
        )
    return found


def config_of(found: Found, *, base: str, chat: bool, tokens: int, out: Path) -> dict[str, Any]:
    """The config: quickstart's recipe on these rows, codes learned from the base LM's own responses (``latent-control
    sample``).

    ``tokens``: of the longest answer. The files' paths are relative to the config ``out`` where they lie beside it.
    """
    path = found.path.relative_to(out.parent) if found.path.is_relative_to(out.parent) else found.path
    stage = {"batch_size": 64, "learning_rate": 1e-3, "data": [samples_source(samples_of(out).name, chat=chat)]}
    evaluation: dict[str, Any] = {"prompts": min(512, max(8, found.rows // 5))}
    if found.slices:
        evaluation["slices"] = list(found.slices)
    return {
        "seed": 0,
        "base": {"model": base},
        "task": {
            "name": found.path.suffix.removeprefix("."),
            "options": {
                "path": str(path),
                "prompt": found.prompt,
                "answer": found.answer,
                "verifier": found.verifier,
                "heldout_share": 0.2,
            },
            "chat": chat,
        },
        "actions": {"num_actions": 64, "updates": 600, **stage},
        "clone": {"updates": 500, **stage},
        "improve": {
            "algorithm": "grpo",
            "updates": 100,
            "epochs": 3,
            "prompts_per_update": 16,
            "group_size": 8,
            "learning_rate": 5e-4,
        },
        "rollout": {"num_workers": 2, "max_new_tokens": tokens + max(4, tokens // 4)},
        "evaluation": evaluation,
    }


def samples_source(path: str, *, chat: bool) -> dict[str, Any]:
    """What ``latent-control sample`` wrote to ``path`` as the data of a stage."""
    # The task's training prompts are those whose hash lies above 0.2: of these, the next tenth is held out.
    return {"kind": "task", "task": {"name": "jsonl", "options": {"path": path, "heldout_share": 0.3}, "chat": chat}}


def samples_of(config: Path) -> Path:
    """Where ``latent-control sample`` puts the base LM's responses: ``mine.yaml`` -> ``mine-samples.jsonl``."""
    return config.with_name(config.stem + SAMPLES)


def text_of(found: Found, config: Mapping[str, Any]) -> str:
    """The config as a YAML file."""
    return (
        f"# Written by latent-control init for {found.path.name}: {found.rows} rows, a fifth of the prompts held out.\n"
        "# Codes are learned from the base LM's own responses: latent-control sample THIS_FILE makes them.\n"
        f"# Answers are judged by the verifier {found.verifier!r}; others, and rewards of your own: docs/tasks.md.\n"
        f"{write(dict(config))}"
    )
