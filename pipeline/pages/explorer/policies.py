"""The policies before and after RL that a run folder holds, or in clear words why there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from configs.loading import load_config
from configs.schema import RunConfig
from latent_control.model import LatentActionLM
from latent_control.pretrained import load_policy
from pipeline.pages.explorer.reading import Models
from pipeline.runs.layout import CONFIG as RUN_CONFIG
from pipeline.runs.layout import STAGE_RECORDS, stage_record
from pipeline.runs.manifest import read_json
from pipeline.runs.stage_table import IMPROVE, behind
from pipeline.runs.status import overview
from pipeline.storage import checkpoints

ABOUT = "the explorer is about what reinforcement learning over codes changed"
AUDIT = "all damage is listed by: latent-control audit"


def policies_of(run_dir: Path, *, hashes: bool = True) -> tuple[Path, Path]:
    """The checkpoints before and after RL. Without ``hashes`` damage inside of their files goes unnoticed, which reads
    no tensor.

    Raises:
        ValueError: there is no improved latent policy yet, there never will be one, or it is damaged.
    """
    config = load_config(run_dir / RUN_CONFIG, [], check_paths=False)
    if (reason := _never(run_dir, config)) is not None:
        raise ValueError(reason)
    if not (run_dir / stage_record(IMPROVE)).is_file():
        raise ValueError(_not_yet(run_dir))
    there = [path for stage in behind("improved")[:-1] if (path := run_dir / stage_record(stage)).is_file()]
    if not there:
        raise ValueError(
            f"{run_dir / STAGE_RECORDS} has no record of what improve started from: the run folder is not whole"
        )
    before, after = (
        (run_dir / str(read_json(path).get("checkpoint"))).resolve()
        for path in (there[-1], run_dir / stage_record(IMPROVE))
    )
    for folder in (before, after):
        if problems := checkpoints.verify(folder, hashes=hashes):
            raise ValueError(
                f"the checkpoint {folder} is damaged ({problems[0]}); bring it back from a copy; {AUDIT} {run_dir}"
            )
    return before, after


def _never(run_dir: Path, config: RunConfig) -> str | None:
    """Why this run will have no policy improved over codes; ``None`` when it will."""
    if config.improve is None and config.improve_offline is not None:
        where = ", ".join(str(source.path) for source in config.improve_offline.data)
        return (
            f"{run_dir} was improved offline only, from the rollouts of {where}, and sampled none of its own: {ABOUT}; "
            "explain that run, and compare the two with latent-control compare"
        )
    if config.improve is None:
        return f"{run_dir} has no stage improve in its config: {ABOUT}; add the section improve and run again"
    if config.improve.level != "latent":
        return (
            f"{run_dir} did its reinforcement learning over tokens (improve.level: token), where there are no "
            f"codes: {ABOUT}"
        )
    return None


def _not_yet(run_dir: Path) -> str:
    now = overview(run_dir)
    where = f"last seen in stage {now.stage} at step {now.step} of {now.total}" if now.stage else "nothing done"
    remedy = "wait until it is done" if now.status == "running" else f"finish it with latent-control resume {run_dir}"
    return f"{run_dir} is not through with its stage improve ({now.status}: {where}): {ABOUT}; {remedy}"


def load_models(before: Path, after: Path, config: RunConfig, tokenizer: Any) -> Models:
    """Both policies on one base LM."""
    device = torch.device("cuda" if config.rollout.gpus_per_worker and torch.cuda.is_available() else "cpu")
    model = LatentActionLM.from_pretrained(
        after, dtype=config.base.dtype, trust_remote_code=config.base.trust_remote_code
    )
    return with_policy_before(model.to(device).hosted(), before, config, tokenizer)


def with_policy_before(model: LatentActionLM, before: Path, config: RunConfig, tokenizer: Any) -> Models:
    """A model and the policy of the checkpoint ``before``."""
    policy = load_policy(before, trust_remote_code=config.base.trust_remote_code).eval().float()
    return Models(
        model=model,
        before=policy.to(model.codebook.device),
        tokenizer=tokenizer,
        temperature=config.rollout.temperature,
        top_k=config.rollout.top_k,
    )
