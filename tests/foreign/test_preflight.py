"""``config check`` means it: after a clean one a run does not end because of its prompts, rows, template or folder."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from configs.loading import load_config
from configs.yaml_text import write
from latent_control.bases import chat_template
from pipeline.preflight.check import check
from pipeline.preflight.problems import Findings
from pipeline.storage.disk_space import folder_problems

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "configs" / "models" / "countdown-1m"
TEMPLATE = "{% for message in messages %}<s> {{ message['content'] }} {% endfor %}"


def base(folder: Path, **changes: dict[str, Any]) -> Path:
    """The embedded base LM with other values in its JSON files: ``base(tmp, config={"vocab_size": 8})``."""
    shutil.copytree(BASE, folder / "base")
    for name, values in changes.items():
        path = folder / "base" / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder / "base"


def rows(folder: Path, prompts: list[str], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps({"prompt": text, "answer": "1 + 2"}) + "\n" for text in prompts))
    return path


def found(folder: Path, prompts: list[str], model: Path = BASE, **sections: Any) -> Findings:
    """What ``check`` says of a config on these prompts."""
    options = {"path": str(rows(folder, prompts)), "heldout_share": 0.3}
    task = {"name": "jsonl", "options": options} | sections.pop("task", {})
    config = {"base": {"model": str(model)}, "task": task, "actions": {"updates": 1}, "clone": {"updates": 1}}
    path = folder / "config.yaml"
    path.write_text(write(config | {"improve": {"updates": 1}} | sections))
    return check(load_config(path, []))


def numbers(count: int, offset: int = 0) -> list[str]:
    return [f"{number} {number + 1} -> 3 :" for number in range(offset, offset + count)]


def test_rows_that_are_fine_are_said_to_be_and_one_is_shown(tmp_path: Path) -> None:
    errors, warnings, notes = found(tmp_path, numbers(40))
    assert (errors, warnings) == ([], [])
    counts = [int(word) for word in notes[0].split() if word.isdigit()]
    assert counts[0] + counts[3] == 40
    assert counts[1:3] == counts[4:6] == [6, 6]  # <s> and five words
    assert notes[1].endswith("6 tokens, as the model sees it:")
    assert notes[2].strip().startswith("'<s> ")


@pytest.mark.parametrize(
    ("improve", "split"),
    [({"prompts_per_update": 64}, "train"), ({"evaluate_every": 1}, "heldout"), ({"evaluate_prompts": 64}, "")],
)
def test_more_different_prompts_than_there_are(improve: dict[str, int], split: str, tmp_path: Path) -> None:
    errors = found(tmp_path, numbers(40), improve={"updates": 2, **improve}).errors
    assert [f"{split} prompts; set it to" in error for error in errors] == ([True] if split else [])


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_one_long_prompt_among_many(split: str, tmp_path: Path) -> None:
    """Wherever it lies: both splits are read whole."""
    for offset in range(50):  # the hash of the prompt decides about its split
        long = " ".join(["7"] * (599 - offset)) + " :"
        errors = found(tmp_path, [*numbers(99), long]).errors
        if any(f"{split} prompts" in error for error in errors):
            break
    tokens = 601 - offset
    (of_limit,) = [error for error in errors if error.startswith("task.max_prompt_tokens")]
    assert "512, but 1 of " in of_limit and f"has {tokens} tokens; set that many, " in of_limit
    assert any(error.startswith("rollout.max_new_tokens: 48 after a prompt of") for error in errors)  # 512 positions


def test_a_limit_is_said_once_for_both_splits(tmp_path: Path) -> None:
    errors = found(tmp_path, [" ".join(["7"] * 600) + f" {number} :" for number in range(40)]).errors
    (error,) = [error for error in errors if error.startswith("task.max_prompt_tokens")]
    train, heldout = (int(error.split(f" {split}")[0].split()[-1]) for split in ("train", "heldout"))
    assert train + heldout == 40 and f"{train} of {train} train and {heldout} of {heldout} heldout prompts" in error
    assert sum(error.startswith("rollout.max_new_tokens") for error in errors) == 1


OPENED: list[str] = []
"""Files, as Python opens them; an audit hook cannot be taken out again."""
sys.addaudithook(lambda name, given: OPENED.append(str(given[0])) if name == "open" and OPENED else None)


def test_rows_are_read_once(tmp_path: Path) -> None:
    """Of the task, and of a file that two stages learn from: by everything that looks at them."""
    samples = rows(tmp_path, numbers(40), "s.jsonl")
    source = {"kind": "task", "task": {"name": "jsonl", "options": {"path": str(samples), "heldout_share": 0.3}}}
    stage = {"updates": 1, "data": [source]}
    OPENED.append("begin")
    try:
        assert found(tmp_path, numbers(40), actions=stage, clone=stage).errors == []
        told = [name for name in OPENED if name.endswith(".jsonl")]
    finally:
        OPENED.clear()
    assert [told.count(str(tmp_path / name)) for name in ("rows.jsonl", "s.jsonl")] == [2, 1]  # one is the writing


def test_the_default_lengths_agree(tmp_path: Path) -> None:
    """A prompt of 301 tokens fits 512 for prompts, so the rows of the offline stages must have room for it."""
    prompts = [" ".join(["7"] * 300) + f" {number} :" for number in range(30)]
    assert found(tmp_path, prompts).errors == []
    (error, *_) = found(tmp_path, prompts, actions={"updates": 1, "max_length": 256}).errors
    assert "actions.data[0]: 30 of 30 rows to train on cannot be used" in error
    assert "set the stage's max_length to more than 303" in error


def test_a_token_beyond_the_embedding(tmp_path: Path) -> None:
    """A slow tokenizer's ids are not in tokenizer.json: the prompts themselves are looked at."""
    from pipeline.preflight.prompts import PromptReading

    reading = PromptReading("task")
    reading.take("row 1", lambda name: (name, [1, 2, 57]), None)
    (error,) = reading.problems(57, "train prompts")
    assert error.startswith(
        "task: train prompts have the token id 57, but the base LM's are 0 to 56; take the tokenizer"
    )
    assert list(reading.problems(58, "train prompts")) == []
    config = json.loads((BASE / "config.json").read_text())
    model = base(tmp_path, tokenizer_config={"eos_token": "<new>"})
    errors = found(tmp_path, numbers(30), model).errors
    assert any(f"beyond the {config['vocab_size']} rows of the embedding" in error for error in errors)


def test_words_that_the_tokenizer_lacks_are_a_warning_with_their_share(tmp_path: Path) -> None:
    errors, warnings, _ = found(tmp_path, [f"{number} apples :" for number in range(30)])
    assert errors == []
    shares = [warning for warning in warnings if warning.startswith("task: 25.0% of the tokens of")]
    assert len(shares) == 2  # of each split: <s>, a number, <unk>, a colon
    assert "prompts are <unk>: the tokenizer does not know these words" in shares[0]


def chat(folder: Path, template: str, prompts: list[str] | None = None) -> list[str]:
    model = base(folder, tokenizer_config={"chat_template": template})
    for file in model.glob("chat_template*"):
        file.unlink()
    return found(folder, prompts or numbers(30), model, task={"chat": True}).errors


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('No tea, no shade') }}", "No tea, no shade"),
        ("{% if messages %}", "Unexpected end of template"),
        ("{{ bot.name }}", "'bot' is undefined"),
        ("{{ ask(messages) }}", "'ask' is undefined"),
        ("{{ prelude }}" + TEMPLATE, "'prelude', a name that nothing gives it"),
        ("", "no chat template"),
        ("{# nothing #}", "gives nothing"),
        ("{{ messages[0]['content'] / 2 }}", "unsupported operand"),
        ("{% if messages[0]['role'] == 'user' %}{{ raise_exception('system first') }}{% endif %}", "system first"),
        ("<s> always the same", "leaves out part of the user message"),
        ("{% for m in messages %}{{ m['content'][:6] }}{% endfor %}", "leaves out part of the user message, '"),
        ("{% for m in messages %}{{ m['content'].split(':')[0] }}{% endfor %}", "':' after"),
        (
            "{% for m in messages %}{{ m['content'] | truncate(5, true, '', 0) }}{% endfor %}",
            "leaves out part of the user message",
        ),
        ("{{ messages[0]['content'] | replace('->', '') }}", "'-> 3 :' after"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes more than"),
        (
            "{% set ns = namespace(x='ab') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "takes more than",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_quoted(
    template: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 2)
    started = time.monotonic()
    errors = chat(tmp_path, template)
    assert time.monotonic() - started < 60
    assert errors and all("Traceback" not in error and "task.chat" in error for error in errors)
    assert any(words in error for error in errors), errors


def test_a_template_that_refuses_some_conversations(tmp_path: Path) -> None:
    """A system message in one row of forty: the row is named, with the template's words."""
    refuses = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    template = refuses + "<s> {{ m['content'] }} {% endfor %}"
    model = base(tmp_path, tokenizer_config={"chat_template": template})
    for file in model.glob("chat_template*"):
        file.unlink()
    asked: list[Any] = [[{"role": "user", "content": text}] for text in numbers(40)]
    asked[7].insert(0, {"role": "system", "content": "be brief"})
    errors = found(tmp_path, asked, model, task={"chat": True}).errors
    assert any("1 of " in error and "refuses this conversation: no system role" in error for error in errors), errors


def test_a_template_that_drops_a_message(tmp_path: Path) -> None:
    """The system message of one row of forty; the assistant's thoughts may go."""
    drops = "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'].split('</think>')[-1] }}"
    template = drops + "{% elif m['role'] != 'system' %} {{ m['content'] | trim }} {% endif %}{% endfor %}"
    model = base(tmp_path, tokenizer_config={"chat_template": template})
    for file in model.glob("chat_template*"):
        file.unlink()
    asked: list[Any] = [[{"role": "user", "content": f"{text}\n"}] for text in numbers(40)]
    asked[3][1:] = [{"role": "assistant", "content": "<think>1</think> 2"}, {"role": "user", "content": "3 :"}]
    assert found(tmp_path, asked, model, task={"chat": True}).errors == []
    asked[7].insert(0, {"role": "system", "content": "be  brief"})
    errors = found(tmp_path, asked, model, task={"chat": True}).errors
    assert any("1 of " in error and "part of the system message, 'be  brief' after 0" in error for error in errors)


def test_a_template_that_is_fine(tmp_path: Path) -> None:
    guarded = "{% if system is defined %}{{ system }}{% endif %}{{ bos_token }} " + TEMPLATE
    assert chat(tmp_path, guarded) == []


def test_a_base_cannot_be_trained_on_rows(tmp_path: Path) -> None:
    errors = found(tmp_path, numbers(30), tmp_path / "new", base={"model": str(tmp_path / "new"), "train": {}}).errors
    assert errors == [
        "base.train: needs a task with a fixed vocabulary, which 'jsonl' has not; set task.name: countdown, or leave "
        "base.train out and name a trained model in base.model"
    ]


def test_text_and_replay_are_read_to_the_end(tmp_path: Path) -> None:
    """The broken line is not the first one."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": "1 2 3"}) + "\n" for _ in range(50)) + "{broken\n")
    data = [{"kind": "text", "path": str(corpus)}]
    errors = found(tmp_path, numbers(30), actions={"updates": 1, "data": data}).errors
    assert len(errors) == 1
    assert errors[0].startswith("actions.data[0]: ") and "line 51" in errors[0]


def test_messages_name_setting_and_remedy(tmp_path: Path) -> None:
    model = base(tmp_path)
    for file in model.glob("tokenizer*"):
        file.unlink()
    (error,) = found(tmp_path, numbers(30), model).errors
    assert error.startswith("base.model: ") and "tokenizer.json" in error
    shutil.copytree(BASE, model, dirs_exist_ok=True)
    (model / "config.json").write_text((BASE / "config.json").read_text()[:100])
    (error,) = found(tmp_path, numbers(30), model).errors
    assert error.startswith("base.model: ") and "config.json" in error and "again" in error
    data = [{"kind": "task", "task": {"name": "jsonl", "options": {"path": "mine-samples.jsonl"}}}]
    (error,) = found(tmp_path, numbers(30), actions={"updates": 1, "data": data}).errors
    assert error.startswith("actions.data[0].task.options.path: ")
    assert "set actions.data[0].task.options.path to" in error and error.endswith("latent-control sample CONFIG")


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(folder_problems(tmp_path / "runs" / "first", "--run-dir")) == []
    assert not (tmp_path / "runs").exists()
    (problem,) = folder_problems(Path("/proc/1/runs"), "--run-dir")
    assert problem.startswith("--run-dir: /proc/1 cannot be written (")
    assert problem.endswith("give another folder (--run-dir)")
    monkeypatch.setattr("pipeline.storage.disk_space.LEAST", 2**60)
    full = list(folder_problems(tmp_path, "--run-dir"))
    assert len(full) == 2 and all("MiB are free on the disk of" in line for line in full)
