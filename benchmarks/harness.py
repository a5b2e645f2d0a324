"""lm-evaluation-harness against our server: two generate-until tasks and one log-likelihood task on local files.

    python benchmarks/harness.py RUN --python LM_EVAL_ENVIRONMENT/bin/python [--documents 64]

``--python`` is an interpreter with ``lm-eval[api]``, in an environment of its own; nothing is downloaded. The documents
are held-out countdown demonstrations; RUN is a run (or export) on countdown, e.g. of quickstart.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from rollout_workers.tasks import TaskConfig, build_task

FIRST = re.compile(r"(\d+ [-+*] \d+ =) (-?\d+)")
COMMON = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{prompt}}", "metadata": {"version": 1}}
EXACT = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}]
TASKS: dict[str, dict[str, Any]] = {
    "countdown_whole": {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 16, "temperature": 0.0},
        "metric_list": EXACT,
    },
    "countdown_first_step": {
        "output_type": "generate_until",
        "doc_to_target": "{{first}}",
        "generation_kwargs": {"until": [" ,"], "max_gen_toks": 16, "temperature": 0.0},
        "metric_list": EXACT,
    },
    "countdown_results": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}} {{step}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
}


def documents(count: int) -> list[dict[str, Any]]:
    """Held-out questions, an answer, its first step, and the step's result among wrong ones."""
    found = []
    for demo in build_task(TaskConfig()).demonstrations("heldout")[: 4 * count]:
        first = FIRST.match(demo.response)
        if first is None or len(found) == count:
            continue
        value = int(first[2])
        choices = sorted({value, value + 1, abs(value - 2), value + 5})
        found.append(
            {
                "prompt": demo.prompt.text,
                "answer": demo.response,
                "first": first[0],
                "step": first[1],
                "choices": [str(one) for one in choices],
                "label": choices.index(value),
            }
        )
    return found


def write_tasks(folder: Path, count: int) -> None:
    """The tasks and their file."""
    rows = folder / "documents.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in documents(count)))
    for name, task in TASKS.items():
        about = {"task": name, **COMMON, "dataset_kwargs": {"data_files": {"test": str(rows)}}, **task}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(about))


def served(run: Path, port: int) -> subprocess.Popen[bytes]:
    """Our server, once it answers."""
    server = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "serve", str(run), "--name", "it", "--port", str(port)]
    )
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).read()
            return server
        except OSError:
            if server.poll() is not None:
                break
            time.sleep(0.5)
    server.kill()
    raise SystemExit("the server did not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--python", required=True)
    parser.add_argument("--tokenizer", type=Path, help="Its folder; default: RUN, an export.")
    parser.add_argument("--documents", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, socket.socket() as taken:
        folder = Path(temporary)
        write_tasks(folder, options.documents)
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.close()
        server = served(options.run, port)
        try:
            about = (
                f"model=it,base_url=http://127.0.0.1:{port}/v1/completions,tokenizer_backend=huggingface,"
                f"tokenizer={(options.tokenizer or options.run).absolute()},"
                "num_concurrent=8,max_retries=3,eos_string=</s>"
            )
            command = [options.python, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", about]
            command += ["--tasks", *TASKS, "--include_path", str(folder), "--output_path", str(folder / "out")]
            subprocess.run(command, check=True, env={"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": temporary})
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)
        (result,) = (folder / "out").rglob("results_*.json")
        scores = json.loads(result.read_text())["results"]
        for name in TASKS:
            numbers = {key: value for key, value in scores[name].items() if isinstance(value, float)}
            print(name, ", ".join(f"{key} {value:.3f}" for key, value in numbers.items()))


if __name__ == "__main__":
    main()
