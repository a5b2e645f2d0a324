"""RLlib's own PPO checkpoint (``save_to_path``, ``from_checkpoint``) under damage, a peer of
``benchmarks/corruption.py``: a row per case.

RLlib has no word on which of several checkpoints to take: a user's resume takes the newest folder.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.ppo import PPOConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from damage import DAMAGES, EMPTY_FOLDER, HALF_FOLDER, half, heard, tried

LOGGERS = ("ray", "ray.rllib", "")


def numbers(tree: Any, place: str = "") -> dict[str, Any]:
    """Every number and array of a state, by its place; clocks and throughputs left out."""
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in numbers(value, f"{place}/{key}").items()}
    if isinstance(tree, list | tuple):
        return {k: v for i, value in enumerate(tree) for k, v in numbers(value, f"{place}/{i}").items()}
    if isinstance(tree, torch.Tensor):
        return {place: tree.detach().numpy()}
    return {place: np.asarray(tree)} if isinstance(tree, np.ndarray | int | float | bool) else {}


def state_of(algorithm: Algorithm) -> dict[str, Any]:
    """Weights, optimiser, counters and connectors: what training goes on from."""
    state = algorithm.get_state()
    return numbers({key: state[key] for key in ("learner_group", "env_runner", "training_iteration") if key in state})


def checkpointed(stem: Path) -> None:
    """A run that left two checkpoints."""
    config = PPOConfig().environment("CartPole-v1").env_runners(num_env_runners=0).debugging(seed=0)
    algorithm = config.training(train_batch_size=64, minibatch_size=32, num_epochs=1).build_algo()
    for number in (1, 2):
        algorithm.train()
        algorithm.save_to_path(str(stem / f"checkpoint-{number}"))
    algorithm.stop()


def resumed(case: Path) -> dict[str, Any]:
    """The state that the newest folder leads to, once training goes on from it."""
    found = Algorithm.from_checkpoint(str(max(case.iterdir(), key=lambda folder: folder.name)))
    try:
        state = state_of(found)
        found.train()
    finally:
        found.stop()
    return state


def rows(work: Path, quick: bool) -> list[dict[str, Any]]:
    """A row per case."""
    stem, case = work / "stem", work / "case"
    checkpointed(stem)

    def prepared() -> Path:
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(stem, case)
        return case / "checkpoint-2"

    prepared()
    with heard(*LOGGERS) as usual:
        undamaged = resumed(case)

    def same() -> bool:
        found = resumed(case)
        return found.keys() == undamaged.keys() and all(
            np.array_equal(found[k], undamaged[k], equal_nan=True) for k in undamaged
        )

    with heard(*LOGGERS) as more:
        assert same(), "an undamaged checkpoint comes back otherwise each time"
    known, newest = {*usual, *more}, stem / "checkpoint-2"
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    found = []
    for file in files[: 1 if quick else None]:
        for damage, hurt in DAMAGES.items():
            hurt(prepared() / file)
            found.append(tried((str(file), damage), same, known, *LOGGERS))
    prepared()
    (case / "checkpoint-3").mkdir()
    found.append(tried(("folder", EMPTY_FOLDER), same, known, *LOGGERS))
    half(prepared(), case / "checkpoint-3")
    return [*found, tried(("folder", HALF_FOLDER), same, known, *LOGGERS)]


def main() -> None:
    """``settings``: threads, quick."""
    settings = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(settings["threads"])
    ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    with tempfile.TemporaryDirectory() as name:
        found = rows(Path(name), settings["quick"])
    ray.shutdown()
    sys.stdin.readline()
    answers.write(json.dumps({"rows": found}) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
