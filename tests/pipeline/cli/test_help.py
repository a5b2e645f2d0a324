"""What ``--help`` shows: ten commands first, then the others by purpose."""

from __future__ import annotations

import re
import subprocess
import sys

from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.cli.panels import FIRST, MORE, PANELS, name_of


def shown() -> dict[str, list[str]]:
    """Panel -> its commands, off the help itself."""
    found: dict[str, list[str]] = {}
    panel = ""
    for line in CliRunner().invoke(app, ["--help"], env={"COLUMNS": "100"}).output.splitlines():
        if head := re.match(r"╭─ (.*?) ─", line):
            panel = head[1]
        elif (command := re.match(r"│ ([a-z][a-z-]+) ", line)) and panel:
            found.setdefault(panel, []).append(command[1])
    return found


def test_ten_commands_come_first_and_none_is_missing():
    panels = shown()
    assert list(panels)[:2] == [FIRST, "Train"] or list(panels)[1:3] == [FIRST, "Train"]
    assert panels[FIRST] == list(PANELS[FIRST]) and len(panels[FIRST]) == 10
    assert {panel: commands for panel, commands in panels.items() if panel in PANELS} == {
        panel: list(commands) for panel, commands in PANELS.items()
    }
    assert MORE not in panels
    everything = {name_of(info) for info in (*app.registered_commands, *app.registered_groups) if not info.hidden}
    assert everything == {command for commands in PANELS.values() for command in commands}


def test_help_loads_nothing_heavy_and_prints_nothing_else():
    code = (
        "import sys; from pipeline.cli.main import app\n"
        "try: app(['--help'], prog_name='latent-control')\n"
        "except SystemExit: print(sorted({'torch', 'ray', 'mlflow', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.splitlines()[-1] == "[]" and told.stderr == ""
