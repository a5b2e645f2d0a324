"""The run that every other is compared with."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos_tools import UPDATES, Run, assert_whole, running
from run_fixtures import once


@pytest.fixture(scope="session")
def whole(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Nothing befalls it."""

    def make(folder: Path) -> None:
        folder.mkdir()
        run = Run(folder / "run", tiny_checkpoint).start()
        with running(run):
            run.end()
        assert_whole(run, UPDATES)

    return Run(once(tmp_path_factory, "whole", make) / "run", tiny_checkpoint)
