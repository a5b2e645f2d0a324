"""Which names of run folders every part of a run can be given."""

from __future__ import annotations

from pathlib import Path

from configs.schema import RunConfig

_OWN, _STORE = "\\%=?#", "%?#"


def name_problem(run_dir: Path, config: RunConfig) -> str:
    """Why a run cannot lie in ``run_dir``; "" where it can. The replay buffer's partitions carry the folder's name,
    and the address of the MLflow store its path."""
    bad = [one for one in run_dir.name if one in _OWN or not one.isprintable()]
    if bad:
        return f"{run_dir}: its name has {bad[0]!a}; leave out \\ % = ? # and control characters"
    beside = config.tracking.enabled and config.tracking.uri is None
    bad = [one for one in str(run_dir.resolve().parent) if beside and one in _STORE]
    if bad:
        return f"{run_dir}: the MLflow store beside it cannot have {bad[0]!r} in its path; rename, or set tracking.uri"
    return ""
