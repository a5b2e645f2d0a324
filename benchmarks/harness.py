"""lm-evaluation-harness against our server: two generate-until tasks and one log-likelihood task on local files.

    python benchmarks/harness.py EXPORT --python LM_EVAL_ENVIRONMENT/bin/python [--documents 64]

``--python`` is an interpreter with ``lm-eval[api]`` and transformers, in an environment of its own; nothing is
downloaded. The documents are held-out countdown demonstrations; EXPORT is of a run on countdown, e.g. quickstart's.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
import yaml
from common import arguments, report

from latent_control.decoding.token_scores import prompt_scores
from latent_control.text import encode_text
from pipeline.serving.service import Service
from pipeline.serving.web import application
from rollout_workers.tasks import TaskConfig, build_task

COMPARED = 16
"""Documents whose log-likelihoods are computed again."""
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


@contextmanager
def served(service: Service) -> Iterator[str]:
    """The address of our server, which ends with the block."""
    config = uvicorn.Config(application(service), host="127.0.0.1", port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def likelihood_gap(service: Service, samples: Sequence[str]) -> float:
    """The largest difference between a choice's log-likelihood as the harness read it, and by one pass of the model."""
    worst = 0.0
    for line in samples:
        sample = json.loads(line)
        for given, (found, *_) in zip(sample["arguments"].values(), sample["resps"], strict=True):
            context, text = given["arg_0"], given["arg_0"] + given["arg_1"]
            start, ids = (encode_text(service.tokenizer, one, chat=False) for one in (context, text))
            scores = [one for part in prompt_scores(service.latent.base, service.actor, ids, most=0) for one in part]
            worst = max(worst, abs(sum(one.logp for one in scores[len(start) - 1 :]) - float(found[0])))
    return worst


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("--python", required=True)
    parser.add_argument("--documents", type=int, default=64)
    options = parser.parse_args()
    service = Service(options.export, "it", device="cpu", slots=32)
    with tempfile.TemporaryDirectory() as temporary, served(service) as address:
        folder = Path(temporary)
        write_tasks(folder, 8 if options.quick else options.documents)
        about = (
            f"model=it,base_url={address}/v1/completions,tokenizer_backend=huggingface,"
            f"tokenizer={options.export.absolute()},num_concurrent=8,max_retries=3,add_bos_token=True"
        )
        command = [options.python, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", about]
        command += ["--tasks", *TASKS, "--include_path", str(folder), "--output_path", str(folder / "out")]
        environment = {"HF_HUB_OFFLINE": "1", "PATH": os.defpath, "HOME": temporary, "OPENAI_API_KEY": "none"}
        subprocess.run([*command, "--log_samples"], check=True, env=environment)
        (result,) = (folder / "out").rglob("results_*.json")
        scores = json.loads(result.read_text())["results"]
        (samples,) = (folder / "out").rglob("samples_countdown_results_*.jsonl")
        gap = likelihood_gap(service, samples.read_text().splitlines()[:COMPARED])
    rows = []
    for name, task in TASKS.items():
        metric = task["metric_list"][0]["metric"]
        score, error = scores[name][f"{metric},none"], scores[name][f"{metric}_stderr,none"]
        kind = task["output_type"]
        rows.append({"task": name, "kind": kind, "metric": metric, "score": f"{score:.3f} (± {1.96 * error:.3f})"})
    report("harness", rows, {"documents": options.documents, "likelihood_gap": gap}, options.out)
    print(f"log-likelihoods differ from one pass of the model by {gap:.1e} at most")


if __name__ == "__main__":
    main()
