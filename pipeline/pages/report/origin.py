"""Provenance of a run's numbers: environment, hashes, commands that reproduce it, related links."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.install import install_command
from configs.loading import dump_config
from configs.redaction import without_secrets
from pipeline.pages.records import Link, ReportSection, Table
from pipeline.pages.report.sources import Sources
from pipeline.runs.layout import CONFIG, EXPLORER, LEDGER, MANIFEST
from pipeline.runs.manifest import read_json
from pipeline.runs.stage_table import IMPROVE, ONLINE
from pipeline.tracking.lineage import config_hash, replay_hash, stage_hash
from pipeline.tracking.server import FIRST_PORT, HOST, deep_link

LABELS = {"cpu": "CPU", "cpus": "CPU cores", "memory_gib": "memory, GiB", "python": "Python"}
BITS = (
    "On CPU, synchronous training repeats bit for bit with the same versions; asynchronous training does so by its "
    "ledger."
)


def environment(sources: Sources) -> ReportSection:
    """Versions, machine, commit, seed and hashes."""
    found = dict(sources.environment)
    packages = found.pop("packages", None) or _packages(sources)
    commit = _commit(sources)
    rows = [
        ["seed", str(sources.config.seed)],
        ["git commit", commit or "not known: no git checkout"],
        ["config, SHA-256", config_hash(sources.run_dir)],
        *([f"checkpoint of {stage}, SHA-256", digest] for stage, digest in _checkpoints(sources).items()),
    ]
    if digest := replay_hash(sources.run_dir):
        rows.append(["replay buffer, SHA-256", digest])
    rows += [[LABELS.get(key, key), str(found[key])] for key in ("host", "system", *LABELS) if found.get(key)]
    if "gpus" in found:
        rows.append(["GPUs", ", ".join(found["gpus"]) or "none"])
    tables = [Table(title="The run", head=("what", "value"), rows=rows)]
    if packages:
        versions = [[n, str(v)] for n, v in packages.items()]
        tables.append(Table(title="Packages", head=("package", "version"), rows=versions))
    old = "The run is of a version that did not write down its machine; versions are those of its checkpoints."
    lines = [] if sources.environment else [old]
    return ReportSection(name="environment", title="Environment", lines=lines, tables=tables)


def reproduce(sources: Sources) -> ReportSection:
    """Exact commands, and the resolved config to give them."""
    commit = _commit(sources)
    clean = commit.removesuffix("-dirty")
    run = sources.run_dir.name
    quoted = shlex.quote(str(sources.run_dir))
    again = "\n".join(
        [
            *([f"git checkout {clean}"] if clean else []),
            install_command(),
            f"latent-control run {quoted}/{CONFIG} --run-dir runs/{shlex.quote(run + '-again')}",
        ]
    )
    commands = [("The same run again, on any machine that has the base LM and the data where the config says", again)]
    if (sources.run_dir / LEDGER).is_dir():
        stages = [stage for stage in reversed(ONLINE) if (sources.run_dir / LEDGER / stage).exists()]
        lines = [
            f"latent-control reproduce {quoted}" + (f" --stage {stage}" if stage != IMPROVE else "") for stage in stages
        ]
        if lines:
            what = "Reinforcement learning repeated in the order its ledger recorded, every policy compared by its hash"
            commands.append((what, "\n".join(lines)))
    commands.append(("Proof that nothing was lost, doubled or over-stale", f"latent-control audit {quoted}"))
    changed = f"The code had been changed since commit {clean}: the commit alone does not give the same code."
    return ReportSection(
        name="reproduce",
        title="How to reproduce",
        lines=[BITS],
        warnings=[changed] if commit != clean else [],
        commands=commands,
        files=[(CONFIG, dump_config(sources.config))],
    )


def elsewhere(sources: Sources, beside: Path) -> ReportSection:
    """Other pages of the run (as files beside the folder ``beside``), and MLflow."""
    links = [
        Link(text=name, target=name if beside == sources.run_dir else (sources.run_dir / name).as_uri(), about=about)
        for name, about in (
            (EXPLORER, "what the codes do, which carry the gain, why an output came about"),
            ("reward-report.html", "parts of the reward"),
        )
        if (sources.run_dir / name).is_file()
    ]
    tracked = sources.tracked
    commands = []
    if tracked:
        what = "MLflow on the run's store, with links to the charts; the links below are for its usual port"
        commands.append((what, f"latent-control ui {shlex.quote(str(sources.run_dir))}"))
        links += mlflow_links(tracked, sources.run_dir.name)
    lines = [] if links else ["Nothing else was written."]
    return ReportSection(name="links", title="Related links", lines=lines, commands=commands, links=links)


def mlflow_links(tracked: Mapping[str, Any], name: str) -> list[Link]:
    """To MLflow's charts of a run and to each of its stages, on the server that has them or that ``ui`` starts."""
    store, experiment = without_secrets(str(tracked["tracking_uri"])), str(tracked["experiment_id"])
    served = store.startswith(("http://", "https://"))
    server, while_up = (store, "") if served else (f"http://{HOST}:{FIRST_PORT}", " (while latent-control ui runs)")
    stages = [
        Link(text=f"MLflow: {stage}", target=f"{server}/#/experiments/{experiment}/runs/{run}", about=f"run {run}")
        for stage, run in tracked["runs"].items()
    ]
    charts = deep_link(experiment, server=server, group=name)
    return [Link(text=f"MLflow: charts of this run{while_up}", target=charts, about=f"store {store}"), *stages]


def _commit(sources: Sources) -> str:
    started = [event for event in sources.events if event["kind"] == "started"]
    return str(sources.environment.get("git_commit") or (started[-1].get("git_commit") if started else "") or "")


def _checkpoints(sources: Sources) -> dict[str, str]:
    stages: Mapping[str, Any] = sources.stages
    return {
        name: digest for name, stage in stages.items() if (digest := stage_hash(sources.run_dir / stage["checkpoint"]))
    }


def _packages(sources: Sources) -> Mapping[str, str]:
    """Those that the newest checkpoint's manifest names."""
    folders = [sources.run_dir / stage["checkpoint"] for stage in reversed(list(sources.stages.values()))]
    return next((versions for folder in folders if (versions := read_json(folder / MANIFEST).get("versions"))), {})
