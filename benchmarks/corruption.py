"""The same damage to every file of a checkpoint, here, in TRL and in RLlib's own PPO: found? gone on from a good state?
silent?

    python benchmarks/corruption.py --peer-python trl/bin/python [--sides ours trl rllib] [--quick] [--out DIR]

(``trl_grpo.py`` says how to make that environment.) Sides that are left out keep their rows of the result that is in
the folder.

A run is killed (SIGKILL) with two checkpoints on the disk. For every file and every damage (torn, a flipped bit, zeros,
empty, gone) it is copied, damaged and resumed as its users would; then with an empty and with a half-written newer
folder. Judged by the end: the weights (RLlib: the state restored) must be bit for bit those that the undamaged copy
leads to. Whatever is said in words beyond what an undamaged resume says counts as found; a file that nothing depends on
counts as ``no effect``. Ours are the files of the whole run folder, not only of its checkpoints; a config that was
changed and is still a config is refused, and put back by the command that the refusal names.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Peer, arguments, report
from damage import DAMAGES, EMPTY_FOLDER, HALF_FOLDER, half, heard, tried
from models import endless
from safetensors.torch import load_file

from configs.loading import load_config
from latent_control.pretrained import base_path
from pipeline.cluster.connect import connected
from pipeline.console.displays import Display
from pipeline.integrity.audit import audit
from pipeline.run import resume
from pipeline.runs.events import read_events
from pipeline.runs.layout import METRICS
from pipeline.runs.metrics_log import records

UPDATES, EVERY = 7, 2
NEWEST = f"checkpoints/improve-{2 * EVERY:08d}"
ARTIFACTS = {
    "checkpoint: manifest": f"{NEWEST}/manifest.json",
    "checkpoint: tree": f"{NEWEST}/learner.json",
    "checkpoint: tensors": f"{NEWEST}/learner.safetensors",
    "checkpoint: metrics": f"{NEWEST}/metrics.jsonl",
    "stage: weights": "checkpoints/actions/latent_actions.safetensors",
    "stage: manifest": "checkpoints/actions/manifest.json",
    "stage: record": "stages/actions.json",
    "replay: shard": "replay/run=*/part-00000001-*.parquet",
    "replay: manifest": "replay/run=*/_manifest.json",
    "ledger: part": f"ledger/improve/updates-{EVERY + 1:08d}-*.parquet",
    "ledger: starts": "ledger/improve/_starts.jsonl",
    "metrics": METRICS,
    "events": "events.jsonl",
    "config": "config.yaml",
    "run manifest": "manifest.json",
}
QUIET = ("started", "finished", "stopped")
"""Kinds of events that say nothing of damage."""


def interrupted(work: Path) -> Path:
    """A run killed between its second checkpoint and its end."""
    work.mkdir()
    checkpoint = endless(work)
    config = work / "stem.yaml"
    config.write_text("improve: {}\n")
    settings = [
        f"base.model={base_path(checkpoint)}",
        f"actions={{init: {checkpoint}, updates: 0}}",
        *("evaluation=null", "explorer.enabled=false", "tracking.enabled=false", "reward.weights={length: -1.0}"),
        *(
            f"improve.updates={UPDATES}",
            f"improve.checkpoint_every={EVERY}",
            "improve.prompts_per_update=2",
            "improve.group_size=4",
        ),
        *(
            "improve.learning_rate=0.01",
            "rollout.num_workers=1",
            "rollout.max_new_tokens=6",
            "cluster.learner_threads=1",
        ),
    ]
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "run",
        str(config),
        *settings,
        "--run-dir",
        str(work / "stem"),
        "--quiet",
    ]
    with subprocess.Popen(command, cwd=ROOT) as process:
        while not any(r["step"] > 2 * EVERY for r in records(work / "stem" / METRICS) if r["stage"] == "improve"):
            if process.poll() is not None:
                sys.exit(f"the run ended early, with {process.returncode}")
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    return work / "stem"


def end_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """Resume it as a user would; what is noted of damage is said aloud. The weights at its end."""
    before = len(read_events(run_dir))
    try:
        resume(run_dir, Display())
    except ValueError as error:
        if "--restore-config" not in str(error):
            raise
        logging.getLogger("pipeline").warning("refused: %s", error)
        resume(run_dir, Display(), restore_config=True)
    for event in read_events(run_dir)[before if (run_dir / "events.jsonl").is_file() else 0 :]:
        if event["kind"] not in QUIET:
            logging.getLogger("pipeline").warning("%s: %s", event["kind"], event["text"])
    wrong = [f"{one.question}: {one.answer}" for one in audit(run_dir) if not one.passed]
    if wrong:
        raise RuntimeError(f"the audit of the resumed run says {wrong}")
    found: dict[str, torch.Tensor] = load_file(run_dir / "checkpoints" / "improve" / "latent_actions.safetensors")
    return found


def ours(work: Path, quick: bool) -> Iterator[dict[str, Any]]:
    """A row per case."""
    stem, case = interrupted(work), work / "case" / "stem"

    def prepared() -> Path:
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(stem, case)
        return case

    with connected(load_config(stem / "config.yaml", check_paths=False)):
        prepared()
        with heard("pipeline") as usual:
            undamaged = end_of(case)

        def same() -> bool:
            found = end_of(case)
            return all(torch.equal(found[name], undamaged[name]) for name in undamaged)

        for artifact, pattern in list(ARTIFACTS.items())[: 1 if quick else None]:
            for damage, hurt in DAMAGES.items():
                (path,) = prepared().glob(pattern)
                hurt(path)
                yield tried((artifact, damage), same, set(usual), "pipeline")
        newer = prepared() / f"checkpoints/improve-{2 * EVERY + 1:08d}"
        newer.mkdir()
        yield tried(("folder", EMPTY_FOLDER), same, set(usual), "pipeline")
        half(prepared() / NEWEST, newer)
        yield tried(("folder", HALF_FOLDER), same, set(usual), "pipeline")


def summary(side: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A line of the table."""
    count = Counter(row["outcome"] for row in rows)
    mattered = len(rows) - count["no effect"]
    silent = [f"{row['artifact']} {row['damage']}" for row in rows if row["outcome"] == "silent"]
    return {
        "side": side,
        "cases": len(rows),
        "no effect": count["no effect"],
        "found": f"{mattered - count['silent']} of {mattered}",
        "went on from a good state": f"{count['found, fell back']} of {mattered}",
        "stopped with an error": count["found, stopped"],
        "warned, then went on otherwise": count["found, went on otherwise"],
        "silent": len(silent),
    }


def sides(names: Sequence[str], peer_python: str, quick: bool) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(name, its rows) of each side that is asked for."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if "ours" in names:
            yield "ours (the whole run folder)", [_told(row) for row in ours(work / "ours", quick)]
        (work / "theirs").mkdir()
        base = base_path(endless(work / "theirs"))
        for name, side, python, script in (
            ("trl", "TRL GRPOTrainer", peer_python, "corruption_trl.py"),
            ("rllib", "RLlib PPO", sys.executable, "corruption_rllib.py"),
        ):
            if name in names:
                with Peer(python, script, {"base": base, "threads": 1, "quick": quick}, threads=1) as peer:
                    yield side, peer.ask("rows")["rows"]


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, repeats=1)
    parser.add_argument("--peer-python", default="", help="interpreter of the environment with TRL")
    parser.add_argument("--sides", nargs="+", choices=["ours", "trl", "rllib"], default=["ours", "trl", "rllib"])
    options = parser.parse_args()
    if "trl" in options.sides and not options.peer_python:
        parser.error(
            "--peer-python is missing: name the interpreter of an environment with TRL, or leave trl out of --sides"
        )
    kept = options.out / "corruption.json"
    found: dict[str, Any] = json.loads(kept.read_text())["cases"] if kept.is_file() else {}
    found |= dict(sides(options.sides, options.peer_python, options.quick))
    report("corruption", [summary(side, rows) for side, rows in found.items()], {"cases": found}, options.out)


def _told(row: dict[str, Any]) -> dict[str, Any]:
    print(f"{row['artifact']}, {row['damage']}: {row['outcome']} {row['error']}", file=sys.stderr, flush=True)
    return row


if __name__ == "__main__":
    main()
