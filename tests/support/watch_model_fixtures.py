"""A finished run whose model answers on the page of ``watch``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.evaluation.outcome_file import write_outcomes
from pipeline.evaluation.outcomes import Outcome
from pipeline.runs.layout import SUMMARY
from pipeline.watch.followed_run import FollowedRun
from pipeline.watch.model_work import ModelWork


@pytest.fixture(scope="module")
def run(explored_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FollowedRun]:
    """The explored run with an evaluation: a greedy answer that the policy gives, and others that it does not."""
    folder = Path(shutil.copytree(explored_run, tmp_path_factory.mktemp("watched") / "run"))
    work = ModelWork(folder, 4.0)
    assert work.loaded.task is not None
    prompt = work.loaded.task.prompts("heldout")[2]
    ((text, success, _),) = work._answers([prompt], None)
    rows = [
        Outcome(
            variant=variant,
            mode=mode,
            prompt_id=prompt.id,
            sample=0,
            success=success,
            reward=float(success),
            reward_parts={},
            response=said,
            prompt=prompt.text,
            new_tokens=6,
        )
        for variant, mode, said in (
            ("improved", "greedy", text),
            ("improved", "sampled", "something else"),
            ("base", "greedy", "7"),
        )
    ]
    write_outcomes(folder / "evaluation.parquet", rows)
    (folder / SUMMARY).write_text(json.dumps({"stages": {"improve": {"seconds": 1.0, "metrics": {}}}}))
    followed = FollowedRun(folder)
    yield followed
    followed.model.close()
