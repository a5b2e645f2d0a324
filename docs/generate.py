"""Writes the pages that are made from the code: ``docs/commands.md`` and ``docs/reference.md``.

``python docs/generate.py`` writes them; ``tests/docs/test_docs.py`` compares them with what the code says.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

import pipeline.cli
from configs.loading import config_schema
from configs.reference import reference
from pipeline.cli.app import app
from pipeline.cli.panels import MORE, PANELS, arrange

DOCS = Path(__file__).resolve().parent
PROGRAM = "latent-control"
HEAD = """# Commands

Made by `python docs/generate.py` from the command line itself; a test keeps it so. `--help` after a command prints the
same. Values in brackets are optional, `...` may be repeated, `section.key=value` is any setting of
[the reference](reference.md). What a run prints, `--json`, exit codes and
completion: [terminal.md](terminal.md).
"""

# Command -> how it is typed most often, and the page that explains it. tests/docs/test_docs_run.py runs these lines.
EXAMPLES = {
    "run": ("CONFIG [section.key=value ...] [--run-dir DIR]", "runs.md"),
    "resume": ("RUN_DIR", "trust.md"),
    "init": ("ROWS -o CONFIG", "tutorial.md"),
    "sample": ("CONFIG", "tutorial.md"),
    "config check": ("CONFIG", "reference.md"),
    "config show": ("CONFIG", "reference.md"),
    "config schema": ("CONFIG", "reference.md"),
    "task check": ("NAME|CONFIG", "tasks.md"),
    "reward report": ("RUN_DIR", "rewards.md"),
    "reward train": ("PAIRS --base MODEL", "tasks.md"),
    "watch": ("RUN_DIR|FOLDER", "watch.md"),
    "runs": ("FOLDER", "runs.md"),
    "show": ("RUN_DIR", "runs.md"),
    "ui": ("RUN_DIR|STORE", "tracking.md"),
    "explain": ("RUN_DIR [--against RUN_DIR]", "explorer.md"),
    "report": ("RUN_DIR", "report.md"),
    "steer": ("RUN [--terminal]", "steering.md"),
    "evaluate": ("RUN_DIR|CHECKPOINT [--prompts N] [--json]", "evaluation.md"),
    "audit": ("RUN_DIR", "trust.md"),
    "diagnose": ("RUN_DIR", "trust.md"),
    "compare": ("RUN_A RUN_B", "comparing.md"),
    "pilot": ("--prompts FILE --minutes M", "comparing.md"),
    "off-policy": ("RUN_DIR|CHECKPOINT --replay RUN_DIR", "offline.md"),
    "tune-codes": ("CONFIG [--minutes M]", "codebook-guide.md"),
    "sweep": ("CONFIG --try key=value,value", "adoption.md"),
    "search": ("RUN --method mcts", "search.md"),
    "train-q": ("RUN", "search.md"),
    "export": ("RUN [-o FOLDER] [--register NAME --alias champion]", "serving.md"),
    "serve": ("FOLDER|RUN", "serving.md"),
    "gateway": ("RUN [--program agent.py]", "gateway.md"),
    "cluster-files": ("kuberay quickstart --run-dir /mnt/runs/first", "cluster.md"),
    "submit": ("CONFIG --address URL --run-dir DIR", "cluster.md"),
    "scale": ("RUN_DIR --rollout-workers N", "cluster.md"),
    "sync": ("RUN_DIR", "tracking.md"),
    "reproduce": ("RUN_DIR", "trust.md"),
}


def commands() -> str:
    """Every command with its arguments, options and help, in the panels of ``latent-control --help``."""
    for module in pkgutil.iter_modules(pipeline.cli.__path__):  # each one adds its commands to the app
        importlib.import_module(f"pipeline.cli.{module.name}")
    arrange(app)
    return "\n".join([HEAD, *_panels(get_command(app))])


def _panels(program: Any) -> Iterator[str]:
    yield from ("## All commands", "", *_options(program, PROGRAM))
    panels: dict[str, list[str]] = {}
    for name, command in program.commands.items():
        for inner, one in getattr(command, "commands", {"": command}).items():
            if not command.hidden:
                panels.setdefault(command.rich_help_panel, []).extend(_command(one, f"{name} {inner}".strip()))
    unknown = [name for name in EXAMPLES if f"### `{PROGRAM} {name}`" not in itertools.chain(*panels.values())]
    assert not unknown, f"EXAMPLES names no command: {unknown}"
    for panel in sorted(panels, key=[*PANELS, MORE].index):
        yield from (f"## {panel}", "", *panels[panel])


def _command(command: Any, name: str) -> Iterator[str]:
    pieces = " ".join(command.collect_usage_pieces(typer.Context(command)))
    usage = re.sub(r"\[(\[.*?\])\]", r"\1", re.sub(r"[{}]", "", pieces)).replace("......", "...")
    yield from (f"### `{PROGRAM} {name}`", "", f"`{name} {usage}`", "")
    yield from (_plain(inspect.cleandoc(command.help or "")), "")
    if name in EXAMPLES:
        words, page = EXAMPLES[name]
        yield from ("```bash", f"{PROGRAM} {name} {words}", "```", "", f"More: [{page}]({page}).", "")
    yield from _options(command, name)


def _options(command: Any, words: str) -> Iterator[str]:
    context = typer.Context(command, info_name=words)
    records = [record for parameter in command.params if (record := parameter.get_help_record(context))]
    if records:
        yield from ("| argument, option | meaning |", "|---|---|")
        for names, meaning in records:
            yield f"| `{_cell(names)}` | {_cell(_plain(meaning))} |"
        yield ""


def _plain(text: str) -> str:
    """Without the marks of rich, and with nothing that Markdown would read as its own."""
    return re.sub(r"\[/?(?:bold|italic|dim|red|green|yellow|cyan)\]", "", text).replace("<", r"\<").replace("*", r"\*")


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", r"\|")


if __name__ == "__main__":
    (DOCS / "commands.md").write_text(commands(), encoding="utf-8")
    (DOCS / "reference.md").write_text(reference(config_schema()), encoding="utf-8")
