"""Mirrors of the metrics in other viewers, read back from their own files."""

from __future__ import annotations

import json
import math
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.schema import Tracking
from pipeline.runs.metrics_log import RunLog
from pipeline.tracking.mirrors import Mirrors


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) of TensorBoard's event files: records of a length, a checksum, the data, a checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[12 + length + 4 :]
    return found


def log(run_dir: Path, notes: list[Any], **settings: Any) -> None:
    mirrors = Mirrors(Tracking(**settings), run_dir, {"seed": "0"}, lambda *said: notes.append(said))
    written = RunLog(run_dir, quiet=True, mirror=mirrors)
    written.log("improve", 1, {"reward": 0.5, "loss": math.nan})
    written.log("improve", 2, {"reward": 0.75})
    mirrors.close()
    written.close()


def test_tensorboard_has_every_finite_number(tmp_path):
    notes: list[Any] = []
    log(tmp_path, notes, tensorboard=True)
    assert scalars(tmp_path / "tensorboard") == [("improve/reward", 1, 0.5), ("improve/reward", 2, 0.75)]
    assert notes == [] and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_nothing_is_written_unasked(tmp_path):
    log(tmp_path, [])
    assert not (tmp_path / "tensorboard").exists() and not (tmp_path / "wandb").exists()


def records_of_wandb(path: Path) -> list[Any]:
    """The records of a ``.wandb`` file: LevelDB's log (blocks of 32 KiB; a checksum, a length, and whether the piece is
    whole, first, middle or last) after 7 letters."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, piece, found = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        piece += data[place + 7 : place + 7 + length]
        place += 7 + length
        if (1 << 15) - place % (1 << 15) < 7:  # no room for another piece in this block
            place += -place % (1 << 15)
        if kind in (1, 4):
            found.append(Record.FromString(piece))
            piece = b""
    return found


def test_weights_and_biases_offline_has_every_finite_number(tmp_path, monkeypatch, capfd):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    notes: list[Any] = []
    for _ in range(2):  # the second as after a resume
        log(tmp_path, notes, wandb="latent")
    assert notes == [] and capfd.readouterr() == ("", "")  # the terminal is the run's own
    stored = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(stored) == 2
    begun, steps = set(), []
    for record in (one for path in stored for one in records_of_wandb(path)):
        if record.HasField("run"):
            begun.add((record.run.project, record.run.run_id, record.run.display_name))
        if record.HasField("history"):
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            steps.append({name: value for name, value in items.items() if not name.startswith("_")})
    ((project, _, name),) = begun  # one W&B run, whatever the starts
    assert (project, name) == ("latent", tmp_path.name)
    assert steps == 2 * [{"improve/reward": 0.5, "improve/step": 1}, {"improve/reward": 0.75, "improve/step": 2}]


def test_one_that_fails_is_left_off_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    notes: list[Any] = []
    log(tmp_path, notes, wandb="latent", tensorboard=True)
    ((kind, said),) = notes
    assert kind == "mirror_lost" and said.startswith("Weights & Biases gets no more metrics") and "pip install" in said
    assert len(scalars(tmp_path / "tensorboard")) == 2
