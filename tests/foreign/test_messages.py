"""Every option, setting and command that a text of ours names exists: messages, help and docstrings of all packages are
read off the syntax trees."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from pydantic import BaseModel

from configs.renamed import RENAMED
from configs.schema import RunConfig
from pipeline.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("configs", "latent_control", "rollout_workers", "learners", "pipeline")
GAP = "\0"
"""Stands for what an f-string fills in."""
BATCH = (
    "job-name nodes ntasks ntasks-per-node cpus-per-task gpus-per-node mem requeue overlap exclude head num-cpus block"
)
OTHERS = {
    "latent_control/auto.py": {"--local-dir"},  # hf download
    "latent_control/bases/smollm2.py": {"--no-deps"},  # pip
    "pipeline/preflight/doctor.py": {"--no-deps"},
    "pipeline/cli/cluster.py": {"--follow"},  # ray job logs
    "pipeline/cluster/manifests.py": {f"--{name}" for name in BATCH.split()},  # sbatch, srun, ray start
    "configs/schema.py": {"--metrics-export-port"},  # ray start
    "pipeline/runs/environment.py": {"--always", "--dirty", "--abbrev", "--exclude"},  # git describe
    "pipeline/tracking/server.py": {"--backend-store-uri", "--workers"},  # mlflow server
    "pipeline/tracking/system_metrics.py": {"--query-gpu", "--format"},  # nvidia-smi
}
"""Options of other programs, by file."""
PYTHON = re.compile(r"\.(py|parquet|md|json|html|css|js|svg|up)$|\.records\.")
"""Names of files and modules, and the example of a word that is half typed."""


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of each string; the pieces of an f-string as one."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else GAP for p in node.values)
            yield node.lineno, " ".join("".join(map(str, parts)).split(" "))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.lineno, node.value


@cache
def sources() -> list[tuple[str, str]]:
    """(place, text) of every string, breaks as blanks."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found += [(f"{name}:{line}", " ".join(text.split())) for line, text in texts(tree)]
    return found


@cache
def commands() -> dict[str, click.Command]:
    """Every command by its words; the root by none."""
    found: dict[str, Any] = {}

    def walk(command: Any, words: tuple[str, ...]) -> None:
        found[" ".join(words)] = command
        for name, child in getattr(command, "commands", {}).items():
            walk(child, (*words, name))

    walk(typer.main.get_command(app), ())
    return found


def options_of(command: click.Command) -> set[str]:
    return {name for param in command.params for name in (*param.opts, *param.secondary_opts)} | {"--help"}


def test_every_option_named_exists() -> None:
    known = {option for command in commands().values() for option in options_of(command)}
    wrong = [
        f"{place}: {option} in {text[:90]!r}"
        for place, text in sources()
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]\b", text)
        if option not in known and option not in OTHERS.get(place.partition(":")[0], ())
    ]
    assert not wrong, "\n".join(wrong)


def test_every_command_named_exists_and_takes_the_options_named_with_it() -> None:
    wrong, seen = [], 0
    for place, text in sources():
        for said in re.findall(r"latent-control ((?:[\w-]+ ?)*[^`;,()]*)", text):
            words = said.split()
            named = ""
            for word in words:
                if (longer := f"{named} {word}".strip()) not in commands():
                    break
                named = longer
            first = re.match(r"[a-z][a-z-]+(?=$|[ .;:,)\]'\"`])", said)
            if not first:
                continue  # "latent-control --debug", an f-string, or the project's name at the end of a sentence
            seen += 1
            if not named or getattr(commands()[named], "commands", None):
                wrong.append(f"{place}: latent-control {said[:40]!r}")
                continue
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]\b", said):
                if option not in options_of(commands()[named]):
                    wrong.append(f"{place}: {option} is no option of {named}")
    assert seen > 40 and not wrong, "\n".join(wrong)


def fields(kind: Any) -> dict[str, Any] | None:
    """The fields of a section, also behind ``X | None`` and tuples; ``None``: anything may stand there."""
    for option in (kind, *getattr(kind, "__args__", ())):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return {name: field.annotation for name, field in option.model_fields.items()}
        if option is not kind and (found := fields(option)) is not None:
            return found
    return None


@cache
def task_options() -> set[str]:
    """Names of all options of tasks, by the classes that read them."""
    import rollout_workers.environments as environments
    from configs.schema import Section
    from rollout_workers import tasks
    from rollout_workers.environments.agent_programs import AgentPrograms, VerifiersPrograms

    assert environments and tasks
    found = {
        "numbers",
        "seed",
        "habit",
        "heldout",
        "slip",
        "data",
    }  # of countdown, reasoning-gym and environments: no section's
    for programs in (AgentPrograms, VerifiersPrograms):
        found |= {field.name for field in dataclasses.fields(programs)}
    waiting = list(Section.__subclasses__())
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__module__.startswith("rollout_workers."):
            found |= set(kind.model_fields)
    return found


def problem(name: str) -> str | None:
    """Which part of ``task.options.path`` is no setting."""
    section: dict[str, Any] | None = {key: field.annotation for key, field in RunConfig.model_fields.items()}
    parts = name.split(".")
    for place, part in enumerate(parts):
        if section is None:
            free = parts[:2] == ["task", "options"] and place == 2
            return part if free and part not in task_options() | {"key"} else None
        if part not in section:
            return part
        section = fields(section[part])
    return None


SETTING = re.compile(
    rf"(?<![\w./{GAP}-])((?:{'|'.join(RunConfig.model_fields)})(?:\[[^\]]*\])?(?:\.[a-z_]+(?:\[[^\]]*\])?)+)(?![\w(/{GAP}])"
)


def test_every_setting_named_exists() -> None:
    wrong, seen = [], 0
    for place, text in sources():
        for named in SETTING.findall(text):
            name = re.sub(r"\[[^\]]*\]", "", named)
            if (
                name in RENAMED
                or PYTHON.search(name)
                or (ROOT / "pipeline" / Path(name.replace(".", "/"))).with_suffix(".py").exists()
            ):
                continue
            seen += 1
            if part := problem(name):
                wrong.append(f"{place}: {named}: there is no {part} in {text[:100]!r}")
    assert seen > 150 and not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("task.options.verifer", "verifer"),
        ("improve.updtes", "updtes"),
        ("task.options.verifier", None),
        ("rollout.turns.max_tokens", None),
        ("actions.data", None),
    ],
)
def test_the_test_can_fail(name: str, part: str | None) -> None:
    assert problem(name) == part
