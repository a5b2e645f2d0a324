"""Requests to a run at work: ``control.json``, written by ``latent-control scale``, read between updates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pipeline.runs.layout import CONTROL
from pipeline.storage.atomic import write_atomic


def write_request(run_dir: Path, workers: int | None) -> None:
    """Request a number of rollout workers; ``None`` leaves it to autoscaling."""
    write_atomic(run_dir / CONTROL, json.dumps({"rollout_workers": workers}).encode())


def read_request(run_dir: Path) -> int | None:
    """The rollout workers asked for, if any.

    Raises:
        ValueError: somebody wrote the file by hand, and wrong.
    """
    path = run_dir / CONTROL
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); write it with latent-control scale") from error
    workers = content.get("rollout_workers") if isinstance(content, Mapping) else 0
    if workers is not None and (type(workers) is not int or workers < 1):
        raise ValueError(
            f'{path} holds {content!r}; expected e.g. {{"rollout_workers": 3}}: write it with latent-control scale'
        )
    return workers
