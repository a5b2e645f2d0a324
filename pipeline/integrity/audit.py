"""``latent-control audit RUN``: the files of a run held against their recorded hashes; ledger, replay buffer,
quarantine, metrics, checkpoints and MLflow held against each other."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from configs.loading import ConfigErrors, load_config
from configs.schema import RunConfig
from latent_control.pretrained import WEIGHTS, weights_hash
from pipeline.integrity.agreement import disagreements
from pipeline.replay.reader import ReplayReader
from pipeline.replay.shards import listed_shards, manifest_problems
from pipeline.rl import ledger
from pipeline.rl.ledger import Attempt, Recorded
from pipeline.runs import events, manifest, seals
from pipeline.runs.layout import CHECKPOINTS, CONFIG, MANIFEST, METRICS, QUARANTINE, REPLAY, stage_record
from pipeline.runs.metrics_log import records
from pipeline.runs.stage_table import STAGES, planned
from pipeline.storage import checkpoints

_COLUMNS = ("rollout_id", "policy_version", "policy_hash", "world_hash", "reward", "level")
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The answer to one question. ``Finding(stage="improve", question="prompts", passed=True, answer="800 consumed
    once")``."""

    stage: str
    question: str
    passed: bool
    answer: str
    recorded: bool = True
    """``False``: there is nothing to compare with, and ``answer`` says what is missing."""

    @property
    def verdict(self) -> str:
        """pass, FAIL or no record."""
        return "FAIL" if not self.passed else "pass" if self.recorded else "no record"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What there is on a stage."""

    stage: str
    config: RunConfig
    recorded: Recorded
    consumed: list[Attempt]
    """Those that an update took, trained on or skipped."""
    played: list[Attempt]
    """Those, and what was sampled for an update and left out of it."""
    rows: dict[str, dict[str, Any]]
    """Of the replay buffer, by rollout id."""
    quarantined: set[str]
    doubled: list[str]
    """Ids that are in the buffer more than once."""
    metrics: list[Mapping[str, Any]]
    world: str | None
    """Hash of codebook and merge module in the stage's result; ``None`` before there is one, and at token level."""
    finished: bool
    saved: int
    """Update of the stage's newest checkpoint; 0 where there is none."""


def audit(run_dir: Path) -> list[Finding]:
    """Every question about a run's files, and about every RL stage of it; nothing in the run is changed but that a
    damaged shard of the replay buffer is set aside, as by any reader."""
    try:
        config = load_config(run_dir / CONFIG, check_paths=False)
    except ConfigErrors as error:
        return [_finding("", "files", [f"{CONFIG} cannot be read: {error}"], "")]
    rows, doubled, damaged = _stored(run_dir / REPLAY)
    quarantined, _, damaged_too = _stored(run_dir / QUARANTINE)
    manifests = [problem for folder in (REPLAY, QUARANTINE) for problem in manifest_problems(run_dir / folder)]
    planned_records = {stage_record(stage.name): stage.name for stage in planned(config)}
    done = [stage for record, stage in planned_records.items() if (run_dir / record).is_file()]
    there = {str(path.relative_to(run_dir)) for path in (run_dir / stage_record("")).parent.glob("*.json")}
    others = [f"{record} is of no stage of this run" for record in sorted(there - planned_records.keys())]
    found = [_files(run_dir, done, [*damaged, *damaged_too, *manifests, *others]), _records(run_dir, done)]
    known: set[str] = set()
    restarts = 0
    names = ledger.stages(run_dir)
    for name in names:
        recorded = ledger.read(run_dir, name)
        evidence = Evidence(
            stage=name,
            config=config,
            recorded=recorded,
            consumed=[a for a in recorded.attempts if a.outcome in ledger.CONSUMED],
            played=[a for a in recorded.attempts if a.outcome in ledger.PLAYED],
            rows=rows,
            quarantined=set(quarantined),
            doubled=doubled,
            metrics=[r for r in records(run_dir / METRICS) if r.get("stage") == name],
            world=None if config.rollout.engine == "simulated" else _world(run_dir / CHECKPOINTS / name),
            saved=max(
                (int(c.name.rpartition("-")[2]) for c in checkpoints.checkpoints(run_dir / CHECKPOINTS, name)),
                default=0,
            ),
            finished=name in done,
        )
        found += [
            question(evidence)
            for question in (_ledger, _prompts, _rollouts, _staleness, _policies, _codebook, _metrics)
        ]
        known |= {rollout for attempt in recorded.attempts for rollout in attempt.rollouts}
        restarts += len(recorded.starts) - 1 + (not evidence.finished)
    found += [_orphans(sorted(rows.keys() - known), restarts)] if names else []
    return [*found, *_tracking(run_dir, config)]


def _files(run_dir: Path, done: Sequence[str], damaged: Sequence[str]) -> Finding:
    wrong = manifest.problems(run_dir)
    manifests = {name for name in manifest.known(run_dir) if name.endswith(f"/{MANIFEST}")}
    exports = {name for name in manifests if not name.startswith(f"{CHECKPOINTS}/")}
    gone = {name for name in exports if not (run_dir / name).parent.is_dir()}  # moved to where it is used
    problems = [*damaged, *events.problems(run_dir), *_lines(run_dir)]
    problems += [f"{name} {problem}" for name, problem in wrong.items() if name not in gone]
    folders = [f for f in sorted((run_dir / CHECKPOINTS).glob("*")) if f.is_dir() and not f.name.startswith(".")]
    for folder in folders:
        problems += [f"checkpoint {folder.name}: {problem}" for problem in checkpoints.verify(folder)]
        problems += [f"checkpoint {folder.name}: {problem}" for problem in _misplaced(folder, done)]
    for name in sorted(exports - gone):
        problems += [f"{name.removesuffix(f'/{MANIFEST}')}: {p}" for p in checkpoints.verify((run_dir / name).parent)]
    for stage in done:
        problems += [f"shard {one} came after its stage had ended" for one in _unlisted(run_dir, stage)]
    return _finding("", "files", problems, f"{len(folders)} checkpoints and all shards are what was written")


def _records(run_dir: Path, done: Sequence[str]) -> Finding:
    """Whether there are hashes to hold the files against."""
    missing = seals.unrecorded(run_dir, list(done))
    renewed = [event for event in events.read_events(run_dir) if event["kind"] == "manifest_renewed"]
    said = [f"no record of {', '.join(missing)}: made by a version that kept no hashes of them"] if missing else []
    if renewed:
        said.append(f"the hashes were taken again after {MANIFEST} was lost: what changed before is not known")
    answer = "; ".join(said) or "of every result, log, shard list, page and base file"
    return Finding(stage="", question="hashes", passed=True, answer=answer, recorded=not said)


def _misplaced(folder: Path, done: Sequence[str]) -> Iterator[str]:
    """Whether a whole checkpoint is another one than its folder's name says, or left over."""
    stage, dash, update = folder.name.rpartition("-")
    if dash and update.isdecimal() and stage in done:
        yield f"stage {stage} is finished and keeps none: it is from elsewhere"
    try:
        info = checkpoints.read_info(folder)
    except (ValueError, LookupError):
        return
    name = folder.name.removesuffix("_best") if not dash else stage
    if info.get("stage", name) != name or (dash and update.isdecimal() and info.get("update") != int(update)):
        yield f"it is {info.get('stage')} {info.get('update', '')}".rstrip()


def _unlisted(run_dir: Path, stage: str) -> Iterator[str]:
    """Shards of a finished stage that its manifest does not list."""
    for folder in sorted((run_dir / REPLAY).glob(f"run=*-{stage}")):
        listed = listed_shards(folder)
        yield from (path.name for path in sorted(folder.glob("[!._]*.parquet")) if path.name not in listed)


def _lines(run_dir: Path) -> Iterator[str]:
    """What is wrong with metrics.jsonl: damaged lines, steps out of order, lines that an earlier start found lost."""
    path = run_dir / METRICS
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    if damaged := len([line for line in lines if line.endswith(b"\n")]) - len(records(path)):
        yield f"{METRICS} has {damaged} damaged lines"
    for stage in STAGES:
        steps = [int(r["step"]) for r in records(path) if r.get("stage") == stage.name]
        if steps != sorted(set(steps)):
            yield f"{METRICS}: the steps of {stage.name} are not there once each, in order"
    kinds = [event["kind"] for event in events.read_events(run_dir)]
    if "finished" in kinds[-1:] and manifest.grown(run_dir, METRICS):
        yield f"{METRICS} has lines that came after the end"
    if [kind for kind in kinds if kind in ("metrics_changed", "lines_restored")][-1:] == ["metrics_changed"]:
        yield f"{METRICS} had lost or changed lines when the run was resumed (events.jsonl)"


def _tracking(run_dir: Path, config: RunConfig) -> list[Finding]:
    """Whether MLflow has the run's numbers; nothing where it is not tracked."""
    if not config.tracking.enabled or not records(run_dir / METRICS):
        return []
    problems, answer = disagreements(run_dir, config)
    if not problems and not answer:
        return [
            Finding(
                stage="", question="tracking", passed=True, answer="the store is away: not compared", recorded=False
            )
        ]
    return [_finding("", "tracking", problems, answer)]


def _ledger(e: Evidence) -> Finding:
    last = e.recorded.parts[-1].last if e.recorded.parts else 0
    problems = list(e.recorded.problems)
    assert e.config.improve is not None
    if last < e.saved:
        problems.append(f"it ends with update {last}, but there is a checkpoint of update {e.saved}")
    if e.finished and last != e.config.improve.updates:
        problems.append(f"it ends with update {last} of {e.config.improve.updates}")
    starts = len(e.recorded.starts)
    return _finding(
        e.stage, "ledger", problems, f"updates 1 to {last} without a gap, {starts} start{'s' * (starts != 1)}"
    )


def _prompts(e: Evidence) -> Finding:
    taken = Counter(a.position for a in e.played)
    passed = {a.position for a in e.recorded.attempts if a.outcome == "passed"}
    left = set(e.recorded.parts[-1].open) if e.recorded.parts else set()
    problems = [f"position {p} was consumed {n} times" for p, n in taken.items() if n > 1]
    problems += [
        f"position {p} was never consumed"
        for p in range(max(taken, default=-1))
        if p not in taken and p not in left and p not in passed
    ]
    problems += [f"position {p} was consumed, but counts as open" for p in sorted(left & taken.keys())]
    problems += [f"position {p} was consumed, but counts as passed over" for p in sorted(passed & taken.keys())]
    problems += _equal_rewards(e)
    again = sum(a.outcome in ("lost", "stale") for a in e.recorded.attempts)
    answer = f"{len(e.consumed)} consumed, each once; {again} attempts came to nothing and were repeated"
    tied = len(e.played) - len(e.consumed)
    answer += f"; {tied} left out, as all their rewards were equal" if tied else ""
    answer += f"; {len(passed)} passed over by the curriculum" if passed else ""
    return _finding(e.stage, "prompts", problems, answer)


def _equal_rewards(e: Evidence) -> Iterator[str]:
    """Groups that were left out though their stored rewards differ."""
    for attempt in e.played:
        if attempt.outcome == "tied" and all(r in e.rows for r in attempt.rollouts):
            rewards = {e.rows[r]["reward"] for r in attempt.rollouts} - {None}
            if len(rewards) > 1:
                yield f"position {attempt.position} was left out as tied, but its rewards are {sorted(rewards)}"


def _rollouts(e: Evidence) -> Finding:
    used = Counter(r for a in e.played for r in a.rollouts)
    problems = [f"{r} was consumed {n} times" for r, n in used.items() if n > 1]
    if e.config.replay.enabled:
        broken = {a.update for a in e.consumed if a.outcome == "skipped"}
        skipped = {r for a in e.played if a.update in broken for r in a.rollouts}
        trained = used.keys() - skipped
        problems += [f"{r} is in the replay buffer more than once" for r in sorted(used.keys() & set(e.doubled))]
        problems += [f"{r} was trained on, but is not in the replay buffer" for r in sorted(trained - e.rows.keys())]
        problems += [f"{r} is missing in {QUARANTINE}/" for r in sorted(skipped - e.quarantined)]
        problems += [
            f"{r} is in the replay buffer, though its update was skipped" for r in sorted(skipped & e.rows.keys())
        ]
    where = ", stored once" if e.config.replay.enabled else " (the replay buffer is switched off)"
    return _finding(e.stage, "rollouts", problems, f"{len(used)} consumed once{where}")


def _staleness(e: Evidence) -> Finding:
    improve = e.config.improve
    assert improve is not None
    bound = 0 if improve.mode == "sync" else math.inf if improve.stale == "reweight" else improve.max_staleness
    ages = Counter(a.update - 1 - a.oldest_version for a in e.consumed)
    late = [a for a in e.consumed if not 0 <= a.update - 1 - a.oldest_version <= bound]
    problems = [f"update {a.update} took position {a.position}, sampled with policy {a.oldest_version}" for a in late]
    return _finding(e.stage, "staleness", problems, f"at most {max(ages, default=0)} (allowed: {bound})")


def _policies(e: Evidence) -> Finding:
    published = e.recorded.policies
    problems = []
    for attempt in e.consumed:
        for rollout in attempt.rollouts:
            row = e.rows.get(rollout)
            if row is not None and published.get(row["policy_version"]) != row["policy_hash"]:
                problems.append(
                    f"{rollout} says policy {row['policy_version']} is {row['policy_hash'][:12]}, which "
                    "was never published"
                )
    return _finding(e.stage, "policies", problems, f"{len(published)} versions, each with one set of weights")


def _codebook(e: Evidence) -> Finding:
    hashes = {e.rows[r]["world_hash"] for a in e.consumed for r in a.rollouts if r in e.rows}
    problems = [f"rollouts were sampled under {len(hashes)} codebooks"] if len(hashes) > 1 else []
    if e.world is not None and not hashes <= {e.world}:
        problems.append(f"rollouts were sampled under {min(hashes)[:12]}, the result has {e.world[:12]}")
    return _finding(
        e.stage, "codebook", problems, "one for all rollouts" + ", and it is the result's" * (e.world is not None)
    )


def _metrics(e: Evidence) -> Finding:
    steps = Counter(int(r["step"]) for r in e.metrics)
    last = max([*steps, *(p.last for p in e.recorded.parts)], default=0)
    problems = [f"step {s} is there {steps[s]} times" for s in range(1, last + 1) if steps[s] != 1]
    logged = {int(r["step"]): r.get("reward") for r in e.metrics}
    rewards: dict[int, list[float]] = {}
    for attempt in e.played:
        values = [e.rows[r]["reward"] for r in attempt.rollouts if r in e.rows]
        rewards.setdefault(attempt.update, []).extend(v for v in values if v is not None)
    for update, values in rewards.items():
        mean, said = sum(values) / len(values) if values else math.nan, logged.get(update)
        if values and (said is None or not math.isclose(mean, said, rel_tol=1e-6, abs_tol=1e-9)):
            problems.append(f"update {update} logged the reward {said}, its rollouts have {mean:.6f}")
    return _finding(e.stage, "metrics", problems, f"steps 1 to {last} once each, with the rewards of their rollouts")


def _orphans(ids: Sequence[str], restarts: int) -> Finding:
    if not ids:
        return Finding(stage="", question="leftovers", passed=True, answer="no rollout that no update knows of")
    answer = f"{len(ids)} rollouts that no update of the ledger took"
    if restarts:  # sampled after the checkpoint that the run went back to, or is at
        return Finding(
            stage="", question="leftovers", passed=True, answer=f"{answer}, of what was interrupted after a checkpoint"
        )
    return _finding("", "leftovers", [answer, *ids], "")


def _finding(stage: str, question: str, problems: Sequence[str], answer: str) -> Finding:
    more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
    return Finding(
        stage=stage,
        question=question,
        passed=not problems,
        answer="; ".join(problems[:_SHOWN]) + more if problems else answer,
    )


def _stored(folder: Path) -> tuple[dict[str, dict[str, Any]], list[str], list[str]]:
    """(rows by rollout id, ids that are there twice, what is wrong with the shards)."""
    if not folder.is_dir():
        return {}, [], []
    reader = ReplayReader(folder, shuffle=False, columns=_COLUMNS)
    rows: dict[str, dict[str, Any]] = {}
    doubled = []
    for row in _rows(reader):
        if row["rollout_id"] in rows:
            doubled.append(row["rollout_id"])
        rows[row["rollout_id"]] = row
    return rows, doubled, [f"shard {one.shard}: {one.reason}" for one in reader.quarantined]


def _rows(reader: ReplayReader) -> Iterator[dict[str, Any]]:
    for batch in reader.batches():
        yield from batch.to_pylist()


def _world(checkpoint: Path) -> str | None:
    try:
        tensors = load_file(checkpoint / WEIGHTS)
    except (OSError, SafetensorError):
        return None
    return weights_hash((name, tensor) for name, tensor in tensors.items() if name.startswith(("codebook", "merge")))


def as_json(findings: Sequence[Finding]) -> str:
    """For programs."""
    passed = all(finding.passed for finding in findings)
    return json.dumps({"passed": passed, "findings": [vars(finding) for finding in findings]}, indent=2)
