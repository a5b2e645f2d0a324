"""Task files: each a small YAML that names a policy of a bank and says what it learns and how."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.loading import ConfigErrors, load_config, load_part
from configs.schema import RunConfig
from configs.yaml_text import dotted
from latent_control.pretrained import base_path, read_shape
from pipeline.runs.folder_name import name_problem
from pipeline.runs.layout import CONFIG
from pipeline.runs.process import at_work_elsewhere
from pipeline.serving import bank as banks
from pipeline.serving.export import read_provenance

OWN = {"name": str, "start": str}
"""Keys of a task file that no other config has."""
DEFAULTS: Mapping[str, Mapping[str, Any]] = {"explorer": {"enabled": False}, "report": {"enabled": False}}
"""``latent-control report RUN`` and ``explain RUN`` write these pages at any time; here the others would wait."""
EACH_ITS_OWN = {"max_new_tokens", "temperature", "top_k", "turns"}
"""Settings of ``rollout`` that are not the workers'."""


@dataclass(frozen=True, kw_only=True)
class MemberTask:
    """A task file, read. ``MemberTask(name="concise", start="", config=..., file=Path("tasks/concise.yaml"))``"""

    name: str
    start: str
    """``NAME[@VERSION]`` of the policy that it starts from; empty: the one that the bank was made with."""
    config: RunConfig
    file: Path


class TaskErrors(ValueError):
    """All that is wrong with all task files, by file."""

    def __init__(self, by_file: Mapping[Path, Sequence[str]]) -> None:
        super().__init__("\n".join(f"{file}: {line}" for file, lines in by_file.items() for line in lines))
        self.by_file = by_file


def read_tasks(bank: Path, files: Sequence[Path], overrides: Sequence[str], out: Path) -> list[MemberTask]:
    """The tasks of these files with ``overrides`` (which hold for all), to be trained on ``bank`` into folders of
    ``out``.

    Raises:
        TaskErrors: with everything that can be seen before work starts, of all files.
        ValueError: ``bank`` is no bank.
    """
    index, fixed = banks.read_index(bank), sections_of(bank)
    tasks: list[MemberTask] = []
    there = _at_work(out)
    wrong: dict[Path, list[str]] = {}
    for file in files:
        try:
            config, own = load_part(file, overrides, fixed=fixed, defaults=DEFAULTS, own=OWN)
        except ConfigErrors as errors:
            wrong[file] = list(errors.messages)
            continue
        task = MemberTask(name=own.get("name", file.stem), start=own.get("start", ""), config=config, file=file)
        wrong[file] = [*_problems(task, index, out), *_disagreements(task, tasks, there)]
        tasks.append(task)
    if any(wrong.values()):
        raise TaskErrors({file: lines for file, lines in wrong.items() if lines})
    return tasks


def sections_of(bank: Path) -> dict[str, Any]:
    """The sections of a member's config that its bank decides: base LM, codebook, and that nothing else is trained."""
    world = bank / banks.WORLD
    shape, trained = read_shape(world), read_provenance(world).get("config") or {}
    base = {key: trained["base"][key] for key in ("dtype", "trust_remote_code") if key in trained.get("base", {})}
    return {
        "base": {"model": base_path(world)} | base,
        "actions": {
            "init": str(world), "updates": 0, "num_actions": shape.num_actions, "span": shape.span,
            "policy_kind": shape.policy_kind, "policy_layers": shape.policy_layers,
        },
        "clone": None, "finetune": None, "improve_offline": None, "evaluation": None, "gates": [],
    }  # fmt: skip


def _problems(task: MemberTask, index: banks.BankIndex, out: Path) -> Iterator[str]:
    """What one task cannot be, beside the problems of any config."""
    config = task.config
    if not re.fullmatch(banks.NAME, task.name):
        yield f"name: {task.name!r:.80} is not a name: take letters, digits, '.', '_' and '-', at most 64"
        return
    if task.start:
        try:
            index.resolve(task.start)
        except banks.UnknownMember as error:
            yield f"start: {error}"
    if problem := name_problem(out / task.name, config):
        yield f"name: {problem}"
    yield from _unsuitable(config)
    if (out / task.name / CONFIG).is_file():
        yield from _changes(out / task.name, config)


def _unsuitable(config: RunConfig) -> Iterator[str]:
    improve = config.improve
    if improve is None:
        yield "improve: missing; say what is to be done, e.g. improve: {updates: 100}"
        return
    for wrong, text in (
        (improve.level != "latent", "improve.level: token has no codes; leave it out"),
        (improve.token_baseline, "improve.token_baseline: a bank has no policies over tokens; leave it out"),
        (improve.refresh_in_flight, "improve.refresh_in_flight: policies share batches here; leave it out"),
        (config.rollout.engine != "local", "rollout.engine: policies share batches in engine local alone"),
        (config.rollout.static_cache, "rollout.static_cache: rows of many policies are not decoded so; leave it out"),
        (config.cluster.num_learners > 0, "cluster.num_learners: one process trains all policies; leave it out"),
        (config.cluster.autoscale is not None, "cluster.autoscale: the workers are shared; leave it out"),
    ):
        if wrong:
            yield text


def _at_work(out: Path) -> tuple[Path, RunConfig] | None:
    """A run whose workers are at work in ``out`` now, which further ones will share."""
    if not at_work_elsewhere(out):
        return None
    for file in sorted(out.glob(f"*/{CONFIG}")):
        with suppress(ConfigErrors):
            return file, load_config(file, check_paths=False)
    return None


def _disagreements(
    task: MemberTask, others: Sequence[MemberTask], there: tuple[Path, RunConfig] | None
) -> Iterator[str]:
    """Where a task asks for another kind of workers than those before it, or has the name of one."""
    for other in others:
        if other.name == task.name:
            yield f"name: {task.name} is also that of {other.file}; give it another"
    first = there or next(((other.file, other.config) for other in others), None)
    if first is None:
        return
    mine, theirs = _of_workers(task.config), _of_workers(first[1])
    for place in mine:
        if mine[place] != theirs[place] and "auto" not in (mine[place], theirs[place]):  # decided by the machine
            yield (
                f"{place}: {mine[place]}, but {first[0]} has {theirs[place]}; all tasks share the workers: give it "
                f"once, by --set {place}=..."
            )


def _of_workers(config: RunConfig) -> dict[str, Any]:
    """What all policies must have in common, by dotted key."""
    data = config.model_dump(mode="json")
    found = {f"rollout.{key}": value for key, value in data["rollout"].items() if key not in EACH_ITS_OWN}
    found |= {f"cluster.{key}": value for key, value in data["cluster"].items()}
    return found | {"improve.mixed_precision": None if config.improve is None else config.improve.mixed_precision}


def _changes(run_dir: Path, config: RunConfig) -> Iterator[str]:
    """Where a run that is there already was begun with other settings."""
    try:
        begun = load_config(run_dir / CONFIG, check_paths=False)
    except ConfigErrors as error:
        yield f"{run_dir / CONFIG} cannot be read: {error.messages[0]}; give another folder with --out"
        return
    old, new = (dict(_leaves(one.model_dump(mode="json"), ())) for one in (begun, config))
    free = {"actions.init", "base.dtype", "improve.mixed_precision"}  # made definite when a run begins
    for place in sorted((old.keys() | new.keys()) - free):
        if old.get(place) != new.get(place):
            yield (
                f"{place}: {new.get(place)}, but {run_dir} was begun with {old.get(place)}; take "
                "that, another name, or another folder with --out"
            )


def _leaves(value: Any, at: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from _leaves(below, (*at, key))
    else:
        yield dotted(at), value
