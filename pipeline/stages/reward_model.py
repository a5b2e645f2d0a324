"""``reward train``: from a file of pairs to a folder with a reward model, for ``task.options.preference.model``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from latent_control.preference import RECORD, Reading
from learners.reward_model import Pair, RewardTraining, train_reward_model
from pipeline.evaluation.statistics import success_interval
from pipeline.runs.layout import METRICS
from pipeline.storage.atomic import sha256_file
from rollout_workers.tasks.protocol import split_of
from rollout_workers.tasks.row_files import read_file

KEYS = ("prompt", "chosen", "rejected")


def read_pairs(path: Path, heldout_share: float) -> tuple[list[Pair], list[Pair]]:
    """(train, held-out) pairs of a ``.jsonl`` or ``.parquet`` file, split by a hash of the prompt.

    Raises:
        ValueError: a row lacks a text, names its place; or a split is empty.
    """
    found: dict[str, list[Pair]] = {"train": [], "heldout": []}
    for place, row in read_file(path):
        if wrong := [key for key in KEYS if not isinstance(row.get(key), str)]:
            raise ValueError(f"{place}: {wrong[0]!r} is {row.get(wrong[0])!r:.60}, not a text; give {', '.join(KEYS)}")
        pair = Pair(**{key: str(row[key]) for key in KEYS})
        if pair.chosen == pair.rejected:
            raise ValueError(f"{place}: chosen and rejected are the same text; remove the row")
        found[split_of(pair.prompt, heldout_share)].append(pair)
    for split, pairs in found.items():
        if not pairs:
            raise ValueError(
                f"{path}: no pair falls to the {split} split; add pairs with other prompts, or change --heldout-share"
            )
    return found["train"], found["heldout"]


def train(
    pairs: Path,
    base: str,
    out: Path,
    settings: RewardTraining,
    reading: Reading,
    heldout_share: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train and save; the result is also the folder's ``reward_model.json``. The folder appears when it is whole."""
    learn, held = read_pairs(pairs, heldout_share)
    work = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    with (work / METRICS).open("w", encoding="utf-8") as curve:

        def log(update: int, metrics: dict[str, float]) -> None:
            curve.write(json.dumps({"update": update, **metrics}) + "\n")
            if "heldout_accuracy" in metrics or update == settings.updates:
                say(
                    f"update {update}/{settings.updates}  "
                    "" + "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
                )

        classifier, tokenizer, right = train_reward_model(base, learn, held, settings, reading, log)
    low, high = success_interval(right, len(held))
    result = {
        "reading": asdict(reading),
        "training": asdict(settings),
        "base": base,
        "pairs_sha256": sha256_file(pairs),
        "train_pairs": len(learn),
        "heldout_pairs": len(held),
        "heldout_accuracy": right / len(held),
        "low": low,
        "high": high,
    }
    classifier.save_pretrained(work)
    tokenizer.save_pretrained(work)
    (work / RECORD).write_text(json.dumps(result, indent=1), encoding="utf-8")
    work.rename(out)
    return result
