"""Off-policy evaluation: estimates a checkpoint's policy from rollouts of other policies, before it goes online."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.loading import load_config
from configs.schema import DataSource, RunConfig
from latent_control.model import LatentActionLM
from latent_control.off_policy import off_policy_report, verdict
from latent_control.pretrained import world_hash
from pipeline.replay.dataset import HELDOUT, StoredRollouts, Versions, logged, read_rollouts
from pipeline.runs.layout import CONFIG, OFF_POLICY
from pipeline.runs.policies import checkpoint_of
from pipeline.runs.stage_table import IMPROVE, IMPROVE_OFFLINE
from pipeline.storage import checkpoints
from pipeline.tracking.results import keep


def judge(
    target: Path,
    replay: Sequence[Path],
    *,
    last_updates: int | None = None,
    versions: Versions | None = None,
    weight_cap: float | None = None,
    estimator: str,
    at_least: float | None = None,
) -> dict[str, Any]:
    """Estimates of a policy's reward on the prompts of replay buffers, and whether it may go online.

    ``versions`` (first, last), ``last_updates``: only rollouts of these policies. By default all, but for a policy that
    was improved offline those of the policies it was improved on.

    Written to ``RUN/off_policy/<checkpoint>-<n>.json``, and to MLflow when the run is tracked.

    Raises:
        ValueError: no such checkpoint, or no rollouts that fit it.
    """
    checkpoint, run_dir = checkpoint_of(target)
    config = load_config(run_dir / CONFIG, [], check_paths=False)
    model = LatentActionLM.from_pretrained(
        checkpoint, dtype=config.base.dtype, trust_remote_code=config.base.trust_remote_code
    )
    sources = [DataSource(kind="replay", path=str(path)) for path in replay]
    if (
        versions is None
        and last_updates is None
        and checkpoint.name == IMPROVE_OFFLINE
        and config.improve_offline is not None
    ):
        versions = config.improve_offline.policy_versions  # what it was improved on is near to it
    rollouts = read_rollouts(sources, world=world_hash(model), versions=versions, last_updates=last_updates)
    if share := checkpoints.read_info(checkpoint).get(HELDOUT):
        rollouts = rollouts.split(share)[1]
    report = off_policy_report(logged(model, rollouts, config.rollout), cap=weight_cap)
    doubts = [*remembered(checkpoint, run_dir, config, replay), *mixed(rollouts)]
    answer, words = verdict(report, estimator, at_least, doubts)
    result = {
        "checkpoint": checkpoint.name,
        "replay": [str(path) for path in replay],
        "unjudged": rollouts.unjudged,
        "estimator": estimator,
        "report": asdict(report),
        "notes": notes(checkpoint, share),
        "verdict": answer,
        "words": words,
    }
    estimates = {f"{name}/{key}": value for name, e in report.estimates.items() for key, value in asdict(e).items()}
    keep(
        result,
        run_dir,
        config.tracking,
        folder=OFF_POLICY,
        name=checkpoint.name,
        params={"estimator": estimator},
        metrics=estimates | {"behaviour": report.behaviour.value, "effective": report.effective},
    )
    return result


def mixed(rollouts: StoredRollouts) -> list[str]:
    """That their rewards are not of one kind."""
    count = rollouts.definitions
    return [f"the rewards follow {count} definitions (other task options or reward.weights)"] if count > 1 else []


def notes(checkpoint: Path, heldout_share: float | None) -> list[str]:
    """Notes on the scope of the estimates."""
    found = ["the estimates are for the prompts of the replay buffer, not for held-out ones"]
    if heldout_share:
        found.append(
            f"only prompts that {checkpoint.name} was not trained on count ({heldout_share:.0%} of the buffer's)"
        )
    return found


def remembered(checkpoint: Path, run_dir: Path, config: RunConfig, replay: Sequence[Path]) -> list[str]:
    """Reasons why the policy may have been trained on these rollouts, whose codes it then rates as likely whatever else
    it learned."""
    known = {path.resolve() for path in trained_on(checkpoint, run_dir, config)}
    again = [path for path in replay if known & {path.resolve(), *path.resolve().parents}]
    found = [f"{checkpoint.name} was trained on the rollouts of {path.name}" for path in again]
    if (
        checkpoint.name == IMPROVE_OFFLINE
        and config.improve_offline is not None
        and not config.improve_offline.heldout_share
    ):
        found.append("improve_offline.heldout_share was 0: it may have been trained on these rollouts")
    return found


def trained_on(checkpoint: Path, run_dir: Path, config: RunConfig) -> list[Path]:
    """Run folders whose rollouts contributed to the policy of ``checkpoint``, back to the run it came from."""
    sources = [*config.clone.data] if config.clone is not None else []
    found = []
    if checkpoints.read_info(checkpoint).get("stage") == IMPROVE:  # so does that of improve_best
        sources += config.improve_offline.data if config.improve_offline is not None else ()
        found.append(run_dir)
    found += [Path(source.path) for source in sources if source.kind == "replay" and source.path is not None]
    init = config.actions.init if config.actions is not None else None
    before = Path(init).parent.parent if init is not None else None
    if init is not None and before is not None and (before / CONFIG).is_file():
        found += trained_on(Path(init), before, load_config(before / CONFIG, [], check_paths=False))
    return found
