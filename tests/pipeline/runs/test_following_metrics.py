"""Following ``metrics.jsonl`` gives what reading it whole gives."""

from __future__ import annotations

from pipeline.runs.following import MetricsFollower
from pipeline.runs.layout import METRICS
from pipeline.runs.metrics_log import RunLog


def test_lines_are_seen_as_they_are_written_and_torn_ones_once_they_are_whole(tmp_path):
    follower = MetricsFollower(tmp_path / METRICS, ["reward", "loss"])
    assert not follower.poll() and follower.series("improve", "reward")[0].size == 0
    log = RunLog(tmp_path, quiet=True)
    log.log("clone", 1, {"loss": 0.5, "other": 7})
    log.log("improve", 1, {"reward": 0.25})
    assert follower.poll() and not follower.poll()
    assert [part.tolist() for part in follower.series("improve", "reward")] == [[1.0], [0.25]]
    assert follower.series("clone", "other")[0].size == 0  # not wanted
    log.log("improve", 2, {"reward": float("nan")})
    log.log("improve", 3, {"reward": 0.75})
    log.close()
    whole = (tmp_path / METRICS).read_bytes()
    (tmp_path / METRICS).write_bytes(whole[:-10])
    follower.poll()
    assert follower.series("improve", "reward")[1].tolist() == [0.25]
    with (tmp_path / METRICS).open("ab") as file:
        file.write(whole[-10:])
    follower.poll()
    assert [part.tolist() for part in follower.series("improve", "reward")] == [[1.0, 3.0], [0.25, 0.75]]
    assert follower.last[:2] == ("improve", 3) and follower.last[2] > 1.7e9


def test_a_damaged_line_is_left_out_and_a_resumed_run_is_read_again(tmp_path):
    log = RunLog(tmp_path, quiet=True)
    for step in (1, 2, 3):
        log.log("improve", step, {"reward": step / 4})
    follower = MetricsFollower(tmp_path / METRICS, ["reward"])
    follower.poll()
    log.truncate("improve", 1)  # as a resumed stage does
    log.log("improve", 2, {"reward": 0.9})
    follower.poll()
    assert follower.series("improve", "reward")[1].tolist() == [0.25, 0.9]
    log.close()
    (tmp_path / METRICS).write_bytes((tmp_path / METRICS).read_bytes().replace(b"0.25", b"0.26"))
    (tmp_path / METRICS).rename(tmp_path / "moved")
    (tmp_path / METRICS).write_bytes((tmp_path / "moved").read_bytes() + b"[1]\nnull\n\xff\xfe\n")
    follower.poll()
    assert follower.series("improve", "reward")[1].tolist() == [0.9]
