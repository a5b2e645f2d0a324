"""Where an RL stage goes on: the newest checkpoint before which nothing is damaged, so that doing the rest again makes
the run whole."""

from __future__ import annotations

import math
from pathlib import Path

from pipeline.replay.reader import ReplayReader
from pipeline.rl import ledger
from pipeline.runs.layout import CHECKPOINTS, LEDGER, REPLAY
from pipeline.storage import checkpoints


def resume_point(run_dir: Path, stage: str, *, stored: bool) -> tuple[Path | None, list[str]]:
    """(the checkpoint to go on from, what was passed over and why).

    Checkpoints are tried from the newest to the oldest. One is passed over when it is damaged itself, or when the
    ledger or (with ``stored``) the replay buffer lacks something of the updates before it, and there is an older one
    that they lack nothing of.
    """
    root = run_dir / CHECKPOINTS
    found, skipped = checkpoints.newest_valid(root, stage)
    if found is None:
        return None, skipped
    whole, why = whole_until(run_dir, stage, stored=stored)
    for folder in checkpoints.checkpoints(root, stage):
        update = int(checkpoints.read_info(folder)["update"]) if not checkpoints.verify(folder) else math.inf
        if update <= whole:
            return folder, skipped + [f"{found.name}: {why}"] * (folder != found)
    return found, [*skipped, f"{why}; no checkpoint is as old as that, the run goes on and the audit will say so"]


def whole_until(run_dir: Path, stage: str, *, stored: bool) -> tuple[float, str]:
    """(the last update up to which nothing is missing, what is missing after it); infinity for runs without a
    ledger."""
    if not (run_dir / LEDGER / stage).is_dir():
        return math.inf, ""
    recorded = ledger.read(run_dir, stage)
    last = 0
    for part in recorded.parts:
        if part.first != last + 1:
            break
        last = part.last
    why = "; ".join([f"the ledger is whole up to update {last} only", *recorded.problems[:1]])
    if stored:
        there = _stored_ids(run_dir / REPLAY)
        for attempt in recorded.attempts:
            missing = [rollout for rollout in attempt.rollouts if rollout not in there]
            if attempt.outcome in ("trained", "tied") and attempt.update <= last and missing:
                last = attempt.update - 1
                why = f"the replay buffer lacks rollouts of update {attempt.update}, e.g. {missing[0]}"
    return last, why


def _stored_ids(folder: Path) -> set[str]:
    if not folder.is_dir():
        return set()
    reader = ReplayReader(folder, shuffle=False, columns=("rollout_id",))
    return {rollout for batch in reader.batches() for rollout in batch.column("rollout_id").to_pylist()}
