"""Walks through all commands, each from one kind of rows: init, config check, sample, run, evaluate, export, serve, a
client. What one command writes, the next takes as it is.

Eighteen walks, the fewest there can be (6 x 3 pairs of rows and prompts alone), cover every pair of (rows) x (prompts)
x (base) x (answers).
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.loading import load_config

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "configs" / "models" / "countdown-1m"
ENV = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
SIZE = 40
KINDS = ("jsonl", "array", "csv", "parquet", "messages", "dataset")
ASKED = ("text", "chat", "few-shot")
BASES = ("base", "instruct", "lora")
ANSWERS = ("few", "many")
WALKS = [
    ("jsonl", "text", "base", "few"),
    ("messages", "chat", "instruct", "many"),
    ("jsonl", "chat", "instruct", "many"),
    ("jsonl", "few-shot", "lora", "few"),
    ("array", "text", "instruct", "many"),
    ("array", "chat", "lora", "few"),
    ("array", "few-shot", "base", "few"),
    ("csv", "text", "lora", "many"),
    ("csv", "chat", "base", "few"),
    ("csv", "few-shot", "instruct", "few"),
    ("parquet", "text", "base", "many"),
    ("parquet", "chat", "lora", "few"),
    ("parquet", "few-shot", "instruct", "many"),
    ("messages", "text", "lora", "few"),
    ("messages", "few-shot", "base", "many"),
    ("dataset", "text", "instruct", "few"),
    ("dataset", "chat", "base", "many"),
    ("dataset", "few-shot", "lora", "many"),
]
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %} "
    "{% endif %}{% endfor %}"
)
"""Words of the countdown vocabulary alone."""


def test_every_pair_is_walked() -> None:
    axes = (KINDS, ASKED, BASES, ANSWERS)
    wanted = {pair for a, b in itertools.combinations(axes, 2) for pair in itertools.product(a, b)}
    walked = {pair for walk in WALKS for pair in itertools.combinations(walk, 2)}
    assert wanted <= walked


def rows(answers: str) -> list[dict[str, str]]:
    said = [["7", "8"][i % 2] if answers == "few" else f"{i + 1} + 3 = {i + 4}" for i in range(SIZE)]
    return [{"question": f"{i + 1} {i + 2} 3 -> {i + 5} :", "solution": said[i]} for i in range(SIZE)]


def written(folder: Path, kind: str, found: list[dict[str, str]]) -> Path:
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


def command(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments], cwd=folder, env=ENV, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"latent-control {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


SHORT = [
    *(
        "actions.updates=8",
        "actions.batch_size=8",
        "actions.min_alive_share=0",
        "clone.updates=4",
        "clone.batch_size=8",
    ),
    *("improve.updates=2", "improve.prompts_per_update=4", "improve.group_size=4", "rollout.num_workers=1"),
]


def walk(folder: Path, kind: str, asked: str, base: str, answers: str) -> None:
    chat = asked == "chat"
    found = rows(answers)
    extra = ["--chat"] if chat else []
    model = base_of(folder, base, chat)
    command(folder, "init", str(written(folder, kind, found)), "-o", "c.yaml", "--base", str(model), *extra)
    more = [*SHORT, *(["task.shots=2", "rollout.stop=['9 9 9']"] if asked == "few-shot" else [])]
    command(folder, "sample", "c.yaml", "--samples", "4", *more)
    command(folder, "config", "check", "c.yaml", *more)
    command(folder, "run", "c.yaml", "--run-dir", "run", "--quiet", *more)
    command(folder, "evaluate", "run")
    command(folder, "export", "run", "-o", "exported")
    prompts = {row["question"] for row in found}
    config = load_config(folder / "run" / "config.yaml")
    assert config.task.chat is chat and config.base.model == str(model)
    sampled = [json.loads(line) for line in (folder / "c-samples.jsonl").read_text().splitlines()]
    assert sampled and all(any(row["prompt"].rstrip().endswith(p) for p in prompts) for row in sampled)
    served(folder, chat, found[0]["question"])


def served(folder: Path, chat: bool, prompt: str) -> None:
    """The export answers a client."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "pipeline", "serve", "exported", "--port", str(port)]
    with subprocess.Popen(
        line, cwd=folder, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            assert server.stdout is not None
            said = ""
            while not (place := re.search(r"http://[\d.]+:\d+", said)):
                new = server.stdout.readline()
                assert new, said
                said += new
            asked: dict[str, Any] = {"model": "exported", "max_tokens": 4, "temperature": 0}
            asked |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
            assert (
                answer(place[0], "chat/completions" if chat else "completions", asked)["usage"]["completion_tokens"] > 0
            )
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


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


@pytest.mark.parametrize(
    "which", [pytest.param(i, id="-".join(w), marks=[pytest.mark.slow]) for i, w in enumerate(WALKS)]
)
def test_walk(tmp_path: Path, which: int) -> None:
    walk(tmp_path, *WALKS[which])
