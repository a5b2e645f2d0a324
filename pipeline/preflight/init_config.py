"""``latent-control init``: a config for a user's own rows: keys, verifier and lengths are inferred from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.schema import TaskConfig
from configs.yaml_text import write
from latent_control.text import encode_plain
from pipeline.preflight.data_sources import SAMPLES
from rollout_workers.judging.maths import final
from rollout_workers.judging.numerals import number_of
from rollout_workers.judging.texts import last_box
from rollout_workers.tasks import Prompt, build_task
from rollout_workers.tasks.dataset_rows import DatasetOptions, Rows, RowsOptions
from rollout_workers.tasks.encoding import encode_prompt
from rollout_workers.tasks.row_files import (
    SPLITS,
    Row,
    dataset_splits,
    near,
    read_dataset,
    read_file,
    saved_dataset,
    split_files,
)
from rollout_workers.tasks.row_limits import MAX_GIB, bounded_rows
from rollout_workers.tasks.row_values import answers_of, asked, conversation, spellings, value_at
from rollout_workers.tasks.scorer_options import Verifier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENOUGH = 10_000
"""Rows of which lengths, tokens and slices are taken."""
PROMPTS = ("prompt", "question", "problem", "instruction", "input", "query", "text", "messages", "conversations")
ANSWERS = (
    *("answer", "answers", "answerKey", "answer_key", "final_answer", "expected_answer", "correct_answer", "solution"),
    *("target", "output", "response", "completion", "label", "ground_truth"),
)
FEWEST = 20
"""With fewer, the held-out fifth is too small for a result."""
FEWEST_CODES, MOST_CODES = 4, 64
LONGEST = 3600.0
"""Seconds that a first run should take at most."""
FEWEST_UPDATES = {"actions": 150, "clone": 100, "improve": 20}
"""Below these there is nothing to see."""
_SHARE = {"heldout_share": 0.2}


@dataclass(frozen=True, kw_only=True)
class RowsFound:
    """``RowsFound(path=Path("rows.jsonl"), rows=200, heldout=40, task=TaskConfig(name="rows", options={...}),
    answers=("4", "39"), prompts=(Prompt(...),), slices=())``"""

    path: Path
    rows: int
    heldout: int
    """Held-out prompts."""
    task: TaskConfig
    answers: tuple[str, ...]
    """Of up to ``ENOUGH`` rows."""
    prompts: tuple[Prompt, ...]
    slices: tuple[str, ...]
    """Other keys with few different values, by which success is reported."""
    unused: tuple[str, ...]
    """Keys that are neither prompt nor answer."""


def look(path: Path, prompt: str | None = None, answer: str | None = None, *, chat: bool = False) -> RowsFound:
    """The keys, verifier and slices that fit the rows at ``path``: a file, a folder of files, or a saved data set.

    Raises:
        ValueError: no such file, a broken row, too few rows, or no key for the prompt or the answer; names the keys.
    """
    name, options, read = _source(path)
    rows = [row for _, row in islice(bounded_rows(read, MAX_GIB), ENOUGH)]
    if len(rows) < FEWEST:
        raise ValueError(f"{path} has {len(rows)} rows; give at least {FEWEST}: a fifth of them is held out")
    prompt_key = _key("prompt", prompt, PROMPTS, rows, lambda value: bool(asked(value) or spellings(value)))
    told = [key for key in ANSWERS if key != prompt_key.lower()]
    if any(map(conversation, _values(rows, prompt_key))):
        told.append(_last(prompt_key))  # its last turn
    answer_key = _key("answer", answer, told, rows, lambda value: bool(answers_of(value)))
    if not chat and any(len(asked(value)) > 1 for value in _values(rows, prompt_key)):
        raise ValueError(f"{path}: {prompt_key!r} holds conversations of several turns; add --chat")
    texts = [text for value in _values(rows, answer_key) for text in answers_of(value)]
    verifier = _verifier(texts)
    task = TaskConfig(
        name=name, chat=chat, options={**options, "prompt": prompt_key, "answer": answer_key, "verifier": verifier}
    )
    built = build_task(task)  # every row is looked at
    assert isinstance(built, Rows), name
    train, heldout = built.prompts("train"), built.prompts("heldout")
    prompts = tuple(split[i] for split in (train, heldout) for i in range(min(ENOUGH, len(split))))
    others = tuple(key for key in rows[0] if key not in (prompt_key.split(".")[0], answer_key.split(".")[0]))
    return RowsFound(
        path=path,
        rows=len(train) + len(heldout),
        heldout=len(heldout),
        task=task,
        answers=tuple(texts),
        prompts=prompts,
        slices=tuple(key for key in others if 2 <= len({str(row.get(key)) for row in rows}) <= 8),
        unused=others,
    )


def _verifier(texts: Sequence[str]) -> Verifier:
    """``number`` for numbers; where each text marks its answer (``#### 72``, a box), what judges that alone."""
    marked = all("####" in text or last_box(text) is not None for text in texts)
    ends = [final(text) for text in texts] if marked else texts
    if texts and all(number_of(text) is not None for text in ends):
        return "number"
    return "math" if texts and marked else "exact"


def _source(path: Path) -> tuple[str, dict[str, Any], Iterator[tuple[str, Row]]]:
    """Name of the task, its options and its rows to train on: splits of a data set, or of a folder, stay apart; class
    labels are read by their names."""
    if path.is_dir():
        splits = list(dataset_splits(str(path))) if saved_dataset(path) else []
        known = splits or [name for name in SPLITS if split_files(path, name)]
        if known:
            split = "train" if "train" in known else known[0]
            held = next((name for name in SPLITS[1:] if name in known and name != split), None)
            apart = {"heldout_split": held} if held else _SHARE
            options = {"path": str(path), "split": split, **apart}
            named = DatasetOptions.model_validate(options).unnamed_classes()
            options |= {"class_names": True} if named else {}
            return "dataset", options, read_dataset(str(path), None, split, class_names=True)
    plain: dict[str, Any] = {"path": str(path), **_SHARE}
    named = RowsOptions.model_validate(plain).unnamed_classes()
    return "rows", plain | ({"class_names": True} if named else {}), read_file(path, class_names=True)


def _key(
    kind: str, given: str | None, known: Sequence[str], rows: Sequence[Row], usable: Callable[[object], bool]
) -> str:
    """``given``, or the known key, or dotted key that ends in one, that most rows have a usable value at."""

    def there(key: str) -> bool:
        return 2 * sum(usable(value) for value in _values(rows, key)) >= len(rows)

    keys = list(dict.fromkeys(key for row in rows[:FEWEST] for key in _keys(row)))
    if given is not None:
        if not there(given):
            raise ValueError(f"--{kind}-key {given}: not every row has it; {near(given, keys)}")
        return given
    names = {key: _last(key) if _last(key) in known else _last(key).lower() for key in keys}
    named = sorted((known.index(name), key.count("."), key) for key, name in names.items() if name in known)
    found = next((key for *_, key in named if there(key)), None)
    if found is None:
        values = [(key, value) for *_, key in named for value in islice(_values(rows, key), 1) if value is not None]
        unread = f" ({values[0][0]!r} holds {values[0][1]!r:.60}, which no task reads)" if values else ""
        raise ValueError(
            f"which key holds the {kind}? Rows have {', '.join(keys) or 'no common key'}; name it with --{kind}-key KEY"
            f"{unread}"
        )
    return found


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _keys(value: Row, prefix: str = "") -> Iterator[str]:
    """The keys of a row, dotted those of mappings in it."""
    for key, child in value.items():
        yield f"{prefix}{key}"
        if isinstance(child, dict):
            yield from _keys(child, f"{prefix}{key}.")


def _values(rows: Sequence[Row], key: str) -> Iterator[object]:
    for row in rows:
        try:
            yield value_at(row, key)
        except KeyError:
            yield None


def config_of(found: RowsFound, tokenizer: PreTrainedTokenizerBase, *, base: str, out: Path) -> dict[str, Any]:
    """The config: usual settings on these rows, codes learned from the base LM's own responses (``latent-control
    sample``). As many codes as the answers have different tokens, and lengths that hold the longest.

    The files' paths are relative to the config ``out`` where they lie beside it.

    Raises:
        ValueError: a conversation needs a chat template that the tokenizer does not have.
    """
    path = found.path.relative_to(out.parent) if found.path.is_relative_to(out.parent) else found.path
    answers = [encode_plain(tokenizer, text, add_special_tokens=False) for text in dict.fromkeys(found.answers)]
    tokens = max(map(len, answers)) + 1
    asked_tokens = max(len(encode_prompt(tokenizer, prompt, chat=found.task.chat)) for prompt in found.prompts)
    room = tokens + max(4, tokens // 4)
    codes = len({token for ids in answers for token in ids}) + 1  # and the end
    stage: dict[str, Any] = {"batch_size": 64, "learning_rate": 1e-3}
    stage["data"] = [samples_source(samples_of(out).name, chat=found.task.chat)]
    task: dict[str, Any] = {
        "name": found.task.name,
        "options": found.task.options | {"path": str(path)},
        "chat": found.task.chat,
    }
    if asked_tokens > found.task.max_prompt_tokens:
        task["max_prompt_tokens"] = asked_tokens
    evaluation: dict[str, Any] = {"prompts": min(512, found.heldout)}
    if found.slices:
        evaluation["slices"] = list(found.slices)
    return {
        "seed": 0,
        "base": {"model": base},
        "task": task,
        "actions": {"num_actions": min(MOST_CODES, max(FEWEST_CODES, codes)), "updates": 600, **stage},
        "clone": {"updates": 500, **stage},
        "improve": {
            "algorithm": "grpo",
            "updates": 100,
            "epochs": 3,
            "prompts_per_update": min(16, found.rows - found.heldout),
            "group_size": 8,
            "learning_rate": 5e-4,
        },
        "rollout": {"num_workers": 2, "max_new_tokens": room},
        "evaluation": evaluation,
    }


def sized(config: dict[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
    """``config`` with as many updates as take ``LONGEST`` on this machine, by the forecast of its stages; never more
    than it had."""
    share = LONGEST / max(LONGEST, sum(seconds.values()))
    fewer = {name: max(least, round(config[name]["updates"] * share)) for name, least in FEWEST_UPDATES.items()}
    return {**config} | {
        name: {**config[name], "updates": min(updates, config[name]["updates"])} for name, updates in fewer.items()
    }


def samples_source(path: str, *, chat: bool) -> dict[str, Any]:
    """What ``latent-control sample`` wrote to ``path`` as the data of a stage."""
    # The task's training prompts are those whose hash lies above 0.2: of these, the next tenth is held out.
    return {"kind": "task", "task": {"name": "jsonl", "options": {"path": path, "heldout_share": 0.3}, "chat": chat}}


def samples_of(config: Path) -> Path:
    """Where ``latent-control sample`` puts the base LM's responses: ``mine.yaml`` -> ``mine-samples.jsonl``."""
    return config.with_name(config.stem + SAMPLES)


def text_of(found: RowsFound, config: Mapping[str, Any]) -> str:
    """The config as a YAML file."""
    return (
        f"# Written by latent-control init for {found.path.name}: {found.rows} rows, {found.heldout} held out.\n"
        "# Codes are learned from the base LM's own responses: latent-control sample THIS_FILE makes them.\n"
        f"# Answers are judged by the verifier {found.task.options['verifier']!r}; others, and rewards of your own: "
        "docs/tasks.md.\n"
        f"{write(dict(config))}"
    )
