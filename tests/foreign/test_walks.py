"""Walks through all commands, each from one stranger's rows: init, config check, sample, run, evaluate, export, the
service, a client. What one command writes, the next takes as it is.

Twelve walks cover every pair of (rows) x (prompts) x (base) x (answers). With one kind of rows a walk there would have
to be 18 (6 x 3 pairs of rows and prompts alone): where both are files with the same keys, the rows to train on come in
one kind and the held-out ones in another, as people bring them. All walks are in this process, on one Ray. A run's own
evaluation and replay buffer, which no later command needs, are left to other tests.
"""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from configs.loading import load_config
from pipeline.cli.main import app
from pipeline.serving.deploy import ServingSettings, check, running

pytest_plugins = ("rl_fixtures",)
ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "configs" / "models" / "countdown-1m"
SIZE = 40
KINDS = ("jsonl", "array", "csv", "parquet", "messages", "dataset")
ASKED = ("text", "chat", "few-shot")
BASES = ("base", "instruct", "lora")
ANSWERS = ("few", "many")
WALKS = [
    (("jsonl", "csv"), "text", "base", "few"),
    (("array", "parquet"), "text", "base", "many"),
    (("csv", "array"), "chat", "instruct", "few"),
    (("parquet", "jsonl"), "chat", "instruct", "few"),
    (("jsonl", "array"), "few-shot", "lora", "many"),
    (("parquet", "csv"), "few-shot", "lora", "many"),
    (("messages",), "text", "instruct", "many"),
    (("messages",), "chat", "lora", "many"),
    (("messages",), "few-shot", "base", "few"),
    (("dataset",), "text", "lora", "few"),
    (("dataset",), "chat", "base", "many"),
    (("dataset",), "few-shot", "instruct", "few"),
]
"""(rows to train on, held-out ones where they come apart), prompts, base, answers."""
SHORTEST = (WALKS[2],)
"""That of the fast suite; nearly all of its time is imports of the Ray workers that it starts."""
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %} "
    "{% endif %}{% endfor %}"
)
"""Words of the countdown vocabulary alone."""


def test_every_pair_is_walked() -> None:
    axes = (KINDS, ASKED, BASES, ANSWERS)
    wanted = {pair for a, b in itertools.combinations(axes, 2) for pair in itertools.product(a, b)}
    single = [(kind, *rest) for kinds, *rest in WALKS for kind in kinds]
    assert wanted == {pair for walk in single for pair in itertools.combinations(walk, 2)}
    assert {kinds[0] for kinds, *_ in WALKS} == set(KINDS) and len(WALKS) <= 12


def rows(answers: str) -> list[dict[str, str]]:
    said = [["7", "8"][i % 2] if answers == "few" else f"{i + 1} + 3 = {i + 4}" for i in range(SIZE)]
    return [{"question": f"{i + 1} {i + 2} 3 -> {i + 5} :", "solution": said[i]} for i in range(SIZE)]


def written(folder: Path, kind: str, found: list[dict[str, str]]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / {"array": "rows.json", "messages": "rows.jsonl", "dataset": "saved"}.get(kind, f"rows.{kind}")
    if kind == "array":
        path.write_text(json.dumps(found))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(found[0]))
            table.writeheader()
            table.writerows(found)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(found), path)
    elif kind == "dataset":
        pytest.importorskip("datasets", reason="datasets is not installed").Dataset.from_list(found).save_to_disk(path)
    else:
        lines: list[Any] = found
        if kind == "messages":
            roles = (("user", "question"), ("assistant", "solution"))
            lines = [{"messages": [{"role": role, "content": row[key]} for role, key in roles]} for row in found]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def base_of(folder: Path, kind: str, chat: bool) -> Path:
    """The embedded base LM as it is, with a chat template, or under a LoRA adapter."""
    path = folder / "base"
    shutil.copytree(BASE, path)
    if kind == "instruct" or chat:
        about = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(json.dumps({**about, "chat_template": TEMPLATE}))
    if kind != "lora":
        return path
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForCausalLM

    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(path), settings).save_pretrained(folder / "adapter")
    return folder / "adapter"


SHORT = [
    "actions.updates=8",
    "actions.batch_size=8",
    "actions.min_alive_share=0",
    "clone.updates=4",
    "clone.batch_size=8",
    "improve.updates=2",
    "improve.prompts_per_update=4",
    "improve.group_size=4",
    "rollout.num_workers=1",
    "evaluation=null",
    "replay.enabled=false",
    "explorer.enabled=false",
    "report.enabled=false",
    "tracking.enabled=false",
]


def command(*arguments: str) -> None:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, f"latent-control {' '.join(arguments)}\n{done.output}\n{done.exception!r}"


def walk(folder: Path, kinds: tuple[str, ...], asked: str, base: str, answers: str) -> None:
    chat = asked == "chat"
    every = rows(answers)
    apart = SIZE * 3 // 4 if len(kinds) > 1 else SIZE
    found, heldout = every[:apart], every[apart:]
    model = base_of(folder, base, chat)
    extra = ["--chat"] if chat else []
    command("init", str(written(folder, kinds[0], found)), "-o", "c.yaml", "--base", str(model), *extra)
    more = [*SHORT, *(["task.shots=2", "rollout.stop=['9 9 9']"] if asked == "few-shot" else [])]
    if heldout:
        more.append(f"task.options.heldout_path={written(folder / 'heldout', kinds[1], heldout)}")
    command("sample", "c.yaml", "--samples", "4", *more)
    command("config", "check", "c.yaml", *more)
    command("run", "c.yaml", "--run-dir", "run", "--quiet", *more)
    command("evaluate", "run", "--prompts", "8")
    command("export", "run", "-o", "exported")
    prompts = {row["question"] for row in found}
    config = load_config(folder / "run" / "config.yaml")
    assert config.task.chat is chat and config.base.model == str(model)
    sampled = [json.loads(line) for line in (folder / "c-samples.jsonl").read_text().splitlines()]
    assert sampled and all(any(row["prompt"].rstrip().endswith(p) for p in prompts) for row in sampled)
    served(folder / "exported", chat, found[0]["question"])


def served(folder: Path, chat: bool, prompt: str) -> None:
    """The export answers a client."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = ServingSettings(folder=folder, name=folder.name, port=port)
    check(settings)
    asked: dict[str, Any] = {"model": folder.name, "max_tokens": 4, "temperature": 0}
    asked |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    with running(settings) as url:
        said = answer(url, "chat/completions" if chat else "completions", asked)
    assert said["usage"]["completion_tokens"] > 0


def answer(url: str, path: str, asked: dict[str, Any]) -> dict[str, Any]:
    """By the openai package where it is installed, else by what that would send."""
    try:
        import openai
    except ModuleNotFoundError:
        request = urllib.request.Request(
            f"{url}/v1/{path}", json.dumps(asked).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            return dict(json.load(reply))
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    made = client.chat.completions if path.startswith("chat") else client.completions
    return dict(made.create(**asked).model_dump())


def named(which: tuple[tuple[str, ...], str, str, str]) -> str:
    kinds, *rest = which
    return "-".join(["+".join(kinds), *rest])


@pytest.mark.parametrize(
    "which",
    [pytest.param(which, id=named(which), marks=[] if which in SHORTEST else [pytest.mark.slow]) for which in WALKS],
)
def test_walk(
    which: tuple[tuple[str, ...], str, str, str], tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    walk(tmp_path, *which)
