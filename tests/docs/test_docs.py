"""What the documentation says can be typed: every command parses, the reference is the schema's, the tutorial runs to
its end."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
import urllib.request
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from doc_commands import PAGES, PLACEHOLDER, ROOT, Line, blocks, written
from typer.exceptions import TyperException
from typer.main import get_command
from typer.testing import CliRunner

from configs.loading import config_schema
from configs.reference import reference
from pipeline.cli.main import app


@cache
def whole_program() -> Any:
    """Made once: it takes 50 ms, and every line of the documentation is parsed."""
    return get_command(app)


def parse(words: list[str]) -> None:
    """As the program would, but that nothing is called; words in capitals stand for values. Raises
    ``TyperException``."""
    command = whole_program()
    if words[0].startswith("-"):  # of the program itself; making a context of --install-completion would install it
        if words[0] not in {option for parameter in command.params for option in parameter.opts}:
            raise TyperException(f"no option {words[0]!r}")
        words = words[1:]
    rest = ["1" if PLACEHOLDER.match(word) else word.split("|")[0] for word in words]
    while rest and (known := getattr(command, "commands", None)) is not None:
        if rest[0] not in known and not rest[0].startswith("-"):
            raise TyperException(f"no command {rest[0]!r}")
        if rest[0].startswith("-"):
            break
        command, *rest = known[rest[0]], *rest[1:]
    if rest:  # a bare name speaks of the command
        command.make_context(command.name, rest)


def test_there_are_commands_to_check() -> None:
    assert len(list(written())) > 60


@pytest.mark.parametrize("line", [pytest.param(line, id=f"{line.page}: {line.text[:60]}") for line in written()])
def test_a_command_parses(line: Line) -> None:
    """Also those that cannot be run here; ``test_docs_run.py`` runs the others."""
    try:
        parse([*line.words])
    except typer.Exit:
        pass  # --help
    except TyperException as error:
        pytest.fail(f"{line.page}: latent-control {line.text}: {error}")


def test_a_command_that_is_not_there_is_found() -> None:
    for wrong in (["rum", "CONFIG"], ["run", "CONFIG", "--run-dri", "X"], ["export"]):
        with pytest.raises(TyperException):
            parse([*wrong] if len(wrong) > 1 else [*wrong, "--register"])


def test_the_reference_is_the_schemas() -> None:
    assert (ROOT / "docs" / "reference.md").read_text() == reference(config_schema()), (
        "latent-control config reference > docs/reference.md"
    )
    assert CliRunner().invoke(app, ["config", "reference"]).output == reference(config_schema())


def test_the_command_page_is_the_programs() -> None:
    """In a process of its own: making the page sorts the app's commands."""
    wrote = "import generate, sys; sys.stdout.write(generate.commands())"
    place = {"cwd": ROOT / "docs", "env": environment() | {"TERM": "dumb", "COLUMNS": "80"}}
    made = subprocess.run([sys.executable, "-c", wrote], capture_output=True, text=True, check=True, **place).stdout
    assert (ROOT / "docs" / "commands.md").read_text() == made, "python docs/generate.py"


def test_every_file_that_the_map_names_is_there() -> None:
    """README's and architecture.md's paths in backticks."""
    for page in (ROOT / "README.md", ROOT / "docs" / "architecture.md"):
        named = re.findall(
            r"`((?:latent_control|learners|rollout_workers|pipeline|configs)/[\w./-]*)`", page.read_text()
        )
        assert named and not [path for path in named if not (ROOT / path).exists()], page.name


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tutorial_leads_from_a_file_to_a_served_model(tmp_path: Path) -> None:
    """By its own commands, in under 15 minutes."""
    started = time.monotonic()
    (tmp_path / "rows.jsonl").write_bytes((ROOT / "docs/examples/rows.jsonl").read_bytes())
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    program = [sys.executable, "-m", "pipeline"]
    text = (ROOT / "docs" / "tutorial.md").read_text()
    lines = [line for block in blocks(text, "<!-- run -->\n") for line in block.splitlines()]
    assert len(lines) == 6
    for line in lines:
        done = subprocess.run(
            [*program, *shlex.split(line)[1:]],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    (serve,) = [
        line for block in blocks(text) for line in block.splitlines() if line.startswith("latent-control serve")
    ]
    (ask,) = [line for block in blocks(text) for line in block.splitlines() if line.startswith("curl")]
    words = shlex.split(ask)
    server = subprocess.Popen(
        [*program, *shlex.split(serve)[1:]], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        assert any("8000" in line for line in server.stdout), "it never said where it serves"
        url = next(word for word in words if word.startswith("http"))
        request = urllib.request.Request(
            url, words[words.index("-d") + 1].encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            assert b'"codes"' in reply.read()
    finally:
        server.terminate()
        server.wait(60)
    assert time.monotonic() - started < 900


def environment() -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": str(ROOT)}
