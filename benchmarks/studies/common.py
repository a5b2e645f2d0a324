"""What the studies share: countdown runs by seed, kept once made; intervals over seeds; the result file and its page.

Every run is ``latent-control run configs/countdown.yaml`` with overrides, one worker and one learner thread, so that
two fit on two cores side by side.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.runs.events import read_events
from pipeline.runs.layout import CONFIG, METRICS, SUMMARY
from pipeline.runs.metrics_log import records

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "docs" / "results"
sys.path.insert(0, str(ROOT))  # for studies that use the packages themselves
ONE_CORE = [
    "rollout.num_workers=1",
    "cluster.learner_threads=1",
    "replay.enabled=false",
    "tracking.enabled=false",
    "explorer.enabled=false",
]
# Two-sided 97.5 % quantiles of Student's t by degrees of freedom.
T = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
J = TypeVar("J")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A reinforcement learning run. ``Curve(rewards=[0.2, ...], seconds=[0.3, ...], summary={...})``."""

    rewards: list[float]
    """Mean reward of each update's rollouts."""
    seconds: list[float]
    """Of each update: sampling, updating, publishing."""
    sampling: list[float]
    updating: list[float]
    format: list[float]
    """Share of each update's rollouts whose steps are all valid; empty where the task has no such part."""
    summary: dict[str, Any]
    heldout: dict[str, float]
    """What the last play of held-out prompts gave, where there was one (``improve.evaluate_every``)."""

    def smooth(self, window: int = 10) -> list[float]:
        """Mean of the last ``window`` rewards at each update from ``window`` on."""
        return [statistics.mean(self.rewards[i - window : i]) for i in range(window, len(self.rewards) + 1)]


def run(out: Path, overrides: Sequence[str], config: str = "countdown") -> Path:
    """The finished run in ``out``; made, or continued where an earlier call was interrupted, unless it is there."""
    if not (out / "done").exists():
        begun = (out / CONFIG).is_file()
        made = ["run", str(ROOT / "configs" / f"{config}.yaml"), *ONE_CORE, *overrides, "--run-dir", str(out)]
        command = [sys.executable, "-m", "pipeline", *(["resume", str(out)] if begun else made), "--quiet"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{out.name} failed: {done.stderr[-2000:]}")
        (out / "done").touch()
    return out


def cloned(out: Path, seed: int, *overrides: str) -> Path:
    """Checkpoint of countdown's codes and cloned policy, measured on a few prompts and texts."""
    return (
        run(out / f"cloned-{seed}", [f"seed={seed}", "improve=null", "evaluation.prompts=64", *overrides])
        / "checkpoints"
        / "clone"
    )


def improved(out: Path, name: str, seed: int, clone: Path, *overrides: str) -> Curve:
    """Quickstart's reinforcement learning from ``clone``."""
    start = [f"seed={seed}", f"actions.init={clone}", "actions.updates=0", "clone=null"]
    return curve(run(out / f"{name}-{seed}", [*start, *overrides]))


def curve(run_dir: Path) -> Curve:
    """What a finished run's reinforcement learning looked like."""
    steps = [record for record in records(run_dir / METRICS) if record["stage"] == "improve"]
    seconds = [s["seconds_sampling"] + s["seconds_updating"] + s["seconds_publishing"] for s in steps]
    return Curve(
        rewards=[s["reward"] for s in steps],
        seconds=seconds,
        sampling=[s["seconds_sampling"] for s in steps],
        updating=[s["seconds_updating"] for s in steps],
        format=[s["reward/format"] for s in steps if "reward/format" in s],
        summary=json.loads((run_dir / SUMMARY).read_text()),
        heldout=next((s for s in reversed(steps) if "heldout_success" in s), {}),
    )


def commits(folders: Sequence[Path]) -> list[str]:
    """Of the code that made these runs."""
    return sorted({event["git_commit"] for folder in folders for event in read_events(folder) if "git_commit" in event})


def side_by_side(work: Callable[[J], R], jobs: Sequence[J], at_once: int = 2) -> list[R]:
    """``work`` of every job, ``at_once`` at a time, in the order of the jobs."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(work, jobs))


def row(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds with Student's 95 % interval."""
    mean, n = statistics.mean(values), len(values)
    half = T[n - 1] * statistics.stdev(values) / n**0.5 if n > 1 else float("nan")
    return {"name": name, "value": mean, "low": mean - half, "high": mean + half, "n": n}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    lines = ["| | mean over seeds | 95 % interval | seeds |", "|---|---|---|---|"]
    lines += [f"| {r['name']} | {r['value']:.3f} | {r['low']:.3f} to {r['high']:.3f} | {r['n']} |" for r in rows]
    return "\n".join(lines)


def write(study: str, script: str, seeds: Sequence[int], rows: Sequence[dict[str, Any]], **more: Any) -> None:
    """``docs/results/<study>.json``; its page is written by hand from it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    described = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    commit = subprocess.run(described, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    content = {"study": study, "script": script, "commit": commit, "seeds": list(seeds), "rows": list(rows), **more}
    (RESULTS / f"{study}.json").write_text(json.dumps(content, indent=1))
    print(table(rows))
