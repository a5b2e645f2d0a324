"""The ledger comes back as it was written, goes back with its run, and says what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.rl.ledger import STARTS, Attempt, Ledger, read, stages
from pipeline.runs.layout import LEDGER


def attempt(position: int, update: int, **changes: object) -> Attempt:
    values = {"attempt": 0, "prompt_index": 7 * position, "outcome": "trained", "request": position, "worker": 1}
    return Attempt(
        **{**values, "oldest_version": update - 1, "newest_version": update - 1, **changes},
        position=position,
        update=update,
    )  # type: ignore[arg-type]


def written(run_dir: Path) -> list[Attempt]:
    """Two parts: updates 1 and 2, update 3."""
    rows = [
        attempt(0, 1, rollouts=("a", "b")),
        attempt(1, 2, outcome="lost", reason='its worker died: "why"'),
        attempt(1, 2, attempt=1),
    ]
    rows.append(attempt(2, 3, outcome="skipped", reason="nan"))
    ledger = Ledger(run_dir, "improve")
    ledger.begin(0)
    ledger.add(rows[:3])
    ledger.flush(2, {0: "h0", 1: "h1", 2: "h2"}, [2, 3])
    ledger.add(rows[3:])
    ledger.flush(3, {0: "h0", 1: "h1", 2: "h2", 3: "h3"}, [3])
    return rows


def test_what_was_noted_is_read_back(tmp_path: Path) -> None:
    rows = written(tmp_path)
    found = read(tmp_path, "improve")
    assert stages(tmp_path) == ["improve"] and not found.problems and found.attempts == rows
    assert [(part.first, part.last, part.open) for part in found.parts] == [(1, 2, (2, 3)), (3, 3, (3,))]
    assert found.policies == {0: "h0", 1: "h1", 2: "h2", 3: "h3"} and [start["version"] for start in found.starts] == [
        0
    ]


def test_going_back_to_a_checkpoint_sets_later_updates_aside(tmp_path: Path) -> None:
    rows = written(tmp_path)
    again = Ledger(tmp_path, "improve")
    again.begin(2, ["improve-00000003: policy.safetensors is missing"])
    again.add([attempt(3, 3)])
    again.flush(3, {2: "h2", 3: "other"}, [])
    found = read(tmp_path, "improve")
    assert not found.problems and found.attempts == [*rows[:3], attempt(3, 3)] and found.policies[3] == "other"
    assert [start["version"] for start in found.starts] == [0, 2] and "is missing" in found.starts[1]["skipped"][0]
    assert len(list((tmp_path / LEDGER / "improve" / "_undone" / "start-2").glob("updates-00000003-*"))) == 1


def test_a_flush_without_an_update_writes_nothing(tmp_path: Path) -> None:
    written(tmp_path)
    again = Ledger(tmp_path, "improve")
    again.begin(3)
    again.flush(3, {3: "h3"}, [])
    assert len(read(tmp_path, "improve").parts) == 2


DAMAGE = [
    ("flip", "do not match the hash"),
    ("drop", "goes on with update 3, expected was 1"),
    ("tear", "do not match the hash"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGE)
def test_damage_is_named(tmp_path: Path, damage: str, said: str) -> None:
    written(tmp_path)
    path = min((tmp_path / LEDGER / "improve").glob("*.parquet"))
    data = bytearray(path.read_bytes())
    if damage == "drop":
        path.unlink()
    else:
        data[40] ^= 1
        path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    assert said in "\n".join(read(tmp_path, "improve").problems)


def test_a_torn_line_on_a_start_costs_that_line_only(tmp_path: Path) -> None:
    written(tmp_path)
    with (tmp_path / LEDGER / "improve" / STARTS).open("a") as file:
        file.write(json.dumps({"start": 2, "version": 3})[:9])
    assert len(read(tmp_path, "improve").starts) == 1
