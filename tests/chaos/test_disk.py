"""A small disk is filled while a run works: it says which, loses nothing, and goes on when there is room."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos_tools import EVERY, UPDATES, Run, assert_undisturbed, running

from pipeline.integrity.diagnose import diagnose
from pipeline.storage import disk_space

pytest_plugins = ("rl_fixtures",)
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MiB, in memory."""
    place = tmp_path / "run"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], check=False, capture_output=True, text=True
    )
    if made.returncode != 0:
        pytest.skip(f"no disk of our own can be mounted here: {made.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(folder: Path) -> Path:
    """The rest of a disk, but for a few bytes."""
    ballast = folder / "ballast"
    with pytest.raises(OSError, match="No space left"), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return ballast


def test_a_full_disk_is_known_and_named(small: Path) -> None:
    fill(small)
    with pytest.raises(OSError) as caught:
        (small / "more").write_bytes(bytes(4096))
    assert disk_space.is_full(caught.value) and not disk_space.is_full(ValueError("24 MiB"))
    assert disk_space.full(small).startswith(f"the disk of {small} is full (0.0 of 24.0 MiB left)")


@pytest.mark.slow
def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_room(
    small: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    whole = Run(tmp_path / "whole", tiny_checkpoint, "tracking.enabled=false").start()
    with running(whole):
        whole.end()
    run = Run(small, tiny_checkpoint, "tracking.enabled=false").start()
    with running(run):
        for update in (EVERY + 1, 2 * EVERY + 1):
            run.reach(update)
            ballast = fill(small)
            run.end(1)
            assert f"error: the disk of {small} is full" in run.words() and "latent-control resume" in run.words()
            ballast.unlink()
            found = diagnose(small)
            run.start()
            if found.state == "failed":  # the event itself may have found no room
                assert found.cause == "the disk is full"
        run.reach(UPDATES)
        run.end()
    assert_undisturbed(run, whole)
