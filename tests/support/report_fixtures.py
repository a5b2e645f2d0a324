"""A finished run's folder by hand: no model, no training, numbers one can add in the head, hostile texts everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from configs.loading import dump_config
from configs.schema import RunConfig
from pipeline.evaluation.outcome_file import write_outcomes
from pipeline.evaluation.outcomes import Outcome
from pipeline.pages.report.examples import answers_of
from pipeline.replay.writer import ReplayWriter
from rollout_workers.rollouts import Rollout

HOSTILE = '</script><script>window.pwned=1</script><img src=x onerror="window.pwned=1">&lt;\u202e\x00{{DATA}}'
PROMPTS, UPDATES, CODES = 20, 30, 8
SOLVED = {
    "base": lambda i: i % 2 == 0,
    "cloned": lambda i: i % 4 == 0,
    "improved": lambda i: i < 15 and i != 4,
    "token_level": lambda i: i < 10,
}
"""Base solves 10 of 20, cloned 5; improved gains the odd ones below 15 (7), and loses 4 and 16, which both had."""
INTERVALS = {"sampled_interval": [0.1, 0.5], "greedy_interval": [0.2, 0.6]}


def config() -> RunConfig:
    return RunConfig(
        base={"model": "x"},
        actions={"num_actions": CODES},
        clone={},
        improve={"updates": UPDATES, "evaluate_every": 10, "evaluate_prompts": 100, "token_baseline": True},
        gates=("success >= 0.5", "improved.greedy >= 0.9"),
        tracking={"enabled": False},
    )


def outcomes() -> list[Outcome]:
    return [
        Outcome(
            variant=variant,
            mode=mode,  # type: ignore[arg-type]
            prompt_id=f"countdown/heldout/{i}",
            sample=0,
            success=solved(i),
            reward=float(solved(i)),
            reward_parts={},
            response=f"{HOSTILE} answer {i} of {variant}",
            prompt=f"{HOSTILE} prompt {i}",
            new_tokens=3,
        )
        for variant, solved in SOLVED.items()
        for mode in ("sampled", "greedy")
        for i in range(PROMPTS)
    ]


def evaluation() -> dict[str, object]:
    def row(variant: str) -> dict[str, object]:
        rate = (
            sum(
                answers_of(outcomes(), "greedy")[variant][key].success
                for key in answers_of(outcomes(), "greedy")[variant]
            )
            / PROMPTS
        )
        cost = {"cost_seconds": 60.0, "cost_tokens": 2400.0, "parameters_trained": 434816.0}
        codes = (
            {"code_perplexity": 5.5, "coverage": 1.0, "alive_codes": 7.0} if variant in ("cloned", "improved") else {}
        )
        return {"sampled": rate, "greedy": rate, "sampled_tokens": 3.0, "nll": 0.129} | INTERVALS | cost | codes

    better = {"mean": 0.25, "low": 0.1, "high": 0.4}
    same = {"mean": -0.01, "low": -0.1, "high": 0.1}
    found = {"prompts": PROMPTS, "samples_per_prompt": 1, **{name: row(name) for name in SOLVED}}
    differences = {
        f"improved - {other}": {"sampled": better, "greedy": same} for other in ("base", "cloned", "token_level")
    }
    return found | {"differences": differences, "notes": [HOSTILE]}


def metrics() -> list[dict[str, object]]:
    """Rewards rise by 1/30 an update; every tenth one held-out prompts are played."""
    rows: list[dict[str, object]] = [
        {
            "stage": "actions",
            "step": i,
            "time": 100.0 + i,
            "loss": 1 / i,
            "inverse_dynamics_alive_share": 0.9,
            "nll_codes": 0.1,
        }
        for i in range(1, 6)
    ]
    for stage in ("token_level", "improve"):
        for i in range(1, UPDATES + 1):
            held = {"heldout_success": 0.5, "heldout_greedy": 0.25} if i % 10 == 0 else {}
            cost = {"rollouts": 8, "tokens": 80, "driver_gib": 1.0, "worker_gib": 0.5, "rollout_workers": 2}
            rates = {"reward": i / 30, "success": i / 30, "entropy": 2.0 - i / 30}
            rows.append({"stage": stage, "step": i, "time": 200.0 + i} | rates | cost | held)
    return rows


def write_replay(folder: Path) -> None:
    """Two rollouts an update; until half way codes 0 to 3 alike, then code 7 alone."""
    writer = ReplayWriter(folder / "replay", 1000, f"{folder.name}-improve")
    for version in range(UPDATES):
        codes = np.arange(4, dtype=np.int32) if version < UPDATES // 2 else np.full(4, 7, np.int32)
        writer.add([_rollout(version, g, codes) for g in range(2)])
    writer.close()


def _rollout(version: int, g: int, codes: np.ndarray) -> Rollout:
    return Rollout(
        rollout_id=f"v{version}-{g}",
        group_id=f"v{version}",
        prompt_id="countdown/train/0",
        prompt_text="p",
        text="t",
        prompt_tokens=np.array([1], np.int32),
        tokens=np.arange(4, dtype=np.int32),
        actions=codes,
        action_logp=np.zeros(4, np.float32),
        finish_reason="stop",
        reward=1.0,
        reward_parts={},
        success=True,
        failure=None,
        policy_version=version,
        policy_hash="p",
        world_hash="w",
        codebook_hash="c",
        level="latent",
        seed=0,
        worker=0,
        created=0.0,
    )


def make_run(folder: Path) -> Path:
    """``folder`` as a run of all stages leaves it behind, without its checkpoints."""
    (folder / "stages").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics()))
    names = ("actions", "clone", "token_level", "improve")
    stages = {
        n: {"seconds": 20.0, "checkpoint": f"checkpoints/{n}", "metrics": {"parameters_trained": 434816.0}}
        for n in names
    }
    for name, record in stages.items():
        (folder / "stages" / f"{name}.json").write_text(json.dumps(record | {"driver_peak_gib": 0.75}))
    verdicts = [
        {"gate": "success >= 0.5", "variant": "improved", "value": 0.65, "passed": True, "tag": ""},
        {"gate": "improved.greedy >= 0.9", "variant": "improved", "value": 0.65, "passed": False, "tag": ""},
    ]
    summary = {
        "stages": stages,
        "evaluation": evaluation(),
        "gates": {"passed": False, "verdicts": verdicts},
        "took": {"evaluate": 12.5},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    about = {"git_commit": "abc-dirty", "cpu": HOSTILE, "cpus": 2, "gpus": [], "packages": {"torch": "2.13.0"}}
    (folder / "environment.json").write_text(json.dumps(about))
    (folder / "explorer.html").write_text("x")
    (folder / "ledger" / "improve").mkdir(parents=True)
    write_outcomes(folder / "evaluation.parquet", outcomes())
    write_replay(folder)
    return folder
