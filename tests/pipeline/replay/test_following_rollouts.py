"""Rollouts that another process reads while they are written, and searches in them."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from replay_rows import rollout

from pipeline.replay.following import COLUMNS, KEPT, RolloutFollower
from pipeline.replay.pending import PENDING, read_pending
from pipeline.replay.reader import ReplayReader
from pipeline.replay.search import MOST_LETTERS, RolloutSearch, rows_of, rows_where, search
from pipeline.replay.writer import ReplayWriter, to_table


def ids(follower: RolloutFollower) -> list[str]:
    return follower.table["rollout_id"].to_pylist()


def names(*numbers: int) -> list[str]:
    return [f"run/{number}" for number in numbers]


class TestFollowing:
    def test_rollouts_are_seen_before_and_after_their_shard(self, tmp_path):
        follower = RolloutFollower(tmp_path)
        assert not follower.poll() and ids(follower) == []
        writer = ReplayWriter(tmp_path, 4, "a")
        writer.add([rollout(0), rollout(1)])
        assert follower.poll() and ids(follower) == names(0, 1) and not list(tmp_path.rglob("*.parquet"))
        assert not follower.poll()
        writer.add([rollout(2), rollout(3), rollout(4)])  # four make a shard, the fifth waits
        assert follower.poll() and ids(follower) == names(0, 1, 2, 3, 4) and follower.total == 5
        writer.close()
        follower.poll()
        assert ids(follower) == names(0, 1, 2, 3, 4) and not (tmp_path / "run=a" / PENDING).exists()

    def test_what_is_shown_is_what_is_stored(self, tmp_path):
        writer, follower = ReplayWriter(tmp_path, 8, "a"), RolloutFollower(tmp_path)
        writer.add([rollout(number, generated=np.array([True] * (1 + number % 7))) for number in range(12)])
        follower.poll()
        shown = rows_of(follower.table, np.arange(12))
        writer.close()
        stored = {row["rollout_id"]: row for row in ReplayReader(tmp_path, shuffle=False).rows()}
        for row in shown:
            for name in COLUMNS:
                assert np.array_equal(row[name], stored[row["rollout_id"]][name]), name

    def test_rows_between_shard_and_pending_file_are_shown_once(self, tmp_path):
        writer = ReplayWriter(tmp_path, 100, "a")
        writer.add([rollout(0)])
        pending = (tmp_path / "run=a" / PENDING).read_bytes()
        writer.close()
        (tmp_path / "run=a" / PENDING).write_bytes(pending)  # as a look between the two finds them
        follower = RolloutFollower(tmp_path)
        follower.poll()
        assert ids(follower) == names(0)

    def test_a_torn_pending_file_gives_what_is_whole(self, tmp_path):
        writer = ReplayWriter(tmp_path, 100, "a")
        path = tmp_path / "run=a" / PENDING
        writer.add([rollout(0)])
        whole = len(path.read_bytes())
        writer.add([rollout(1)])
        path.write_bytes(path.read_bytes()[: whole + 40])
        assert read_pending(path.parent, ["rollout_id"], 1 << 20)["rollout_id"].to_pylist() == names(0)
        assert len(read_pending(path.parent, ["rollout_id"], 100)) == 0  # larger than what is read
        for strange in (b"", b"ARROW1\0\0" * 9, os.urandom(500)):
            path.write_bytes(strange)
            assert len(read_pending(path.parent, ["rollout_id"], 1 << 20)) == 0

    def test_what_a_killed_process_left_is_not_shown(self, tmp_path):
        ReplayWriter(tmp_path, 100, "a").add([rollout(0)])
        writer, follower = ReplayWriter(tmp_path, 100, "a"), RolloutFollower(tmp_path)
        assert writer.rows == 0 and not follower.poll() and ids(follower) == []

    def test_a_damaged_shard_is_left_out_and_left_alone(self, tmp_path, caplog):
        for first in (0, 4):
            writer = ReplayWriter(tmp_path, 4, "a")
            writer.add([rollout(number) for number in range(first, first + 4)])
        shard = sorted(tmp_path.rglob("part-*.parquet"))[0]
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
        follower = RolloutFollower(tmp_path)
        follower.poll()
        assert ids(follower) == names(4, 5, 6, 7) and shard.read_bytes() == data
        assert "damaged after it was written" in caplog.text

    def test_a_full_disk_does_not_stop_the_writer(self, tmp_path):
        writer = ReplayWriter(tmp_path, 100, "a")
        (tmp_path / "run=a" / PENDING).mkdir()  # nothing can be written there
        assert writer.add([rollout(0)]).rows == 1
        writer.close()
        assert [row["rollout_id"] for row in ReplayReader(tmp_path).rows()] == names(0)


def table(*texts: str, **changes: object) -> pa.Table:
    made = [replace(rollout(number), text=text, **changes) for number, text in enumerate(texts)]
    return to_table(made).select(COLUMNS)


def found(rows: pa.Table, **wanted: object) -> list[int]:
    return search(rows, RolloutSearch(**wanted)).rows.tolist()  # type: ignore[arg-type]


class TestSearch:
    def test_text_and_patterns_newest_first(self):
        rows = table("3 + 4 = 7", "3 * 4 = 12", "Stop.", "7 - 4 = 3")
        assert found(rows, text="= 7") == [0] and found(rows, text="stop") == [2]
        assert found(rows, text=r"= \d$", regex=True) == [3, 0]
        assert found(rows, text=r"= \d") == []  # as letters
        assert found(rows) == [3, 2, 1, 0]

    def test_filters(self):
        rows = table(*"abcdefgh")  # rewards 0, 0.5, 1, 1.5 twice; success at 2 and 6; prompts g0 and g1; all version 0
        assert found(rows, success="good") == [6, 2] and found(rows, success="bad", least_reward=1.0) == [7, 3]
        assert found(rows, most_reward=0.0) == [4, 0] and found(rows, prompt="TRAIN/1") == [7, 6, 5, 4]
        assert found(rows, prompt="count 3") == [3] and found(rows, finish="length") == []
        assert found(rows, first_update=1) == [] and found(rows, last_update=0, text="c") == [2]
        assert found(table("a", reward=None), least_reward=-9.0) == []  # not judged
        assert rows_where(rows, "group_id", "run/g1").tolist() == [4, 5, 6, 7]

    @pytest.mark.parametrize("pattern", ["(", "a{1001}", "((a{30}){30}){30}", r"(?<=x)y", r"\1"])
    def test_wrong_patterns_are_named(self, pattern):
        with pytest.raises(ValueError, match="is not a regular expression"):
            search(table("a"), RolloutSearch(text=pattern, regex=True))

    def test_a_long_pattern_is_refused(self):
        with pytest.raises(ValueError, match=f"401 letters: give at most {MOST_LETTERS}"):
            search(table("a"), RolloutSearch(text="a" * 401, regex=True))

    def test_twenty_thousand_rollouts_in_half_a_second_and_no_pattern_for_ever(self):
        rows = pa.concat_tables(
            [table(*(f"{n} + 3 = {n + 3} , 16 + {'a' * 80}" for n in range(1000)))] * (KEPT // 1000)
        )
        assert len(rows) == 20_000
        for pattern in (r"(\d+ [+*-] )+3 = 1\d\d ", r"(a+)+$", r"(a|a)*b", "(.*)(.*)(.*)(.*)x"):
            began = time.thread_time()
            search(rows, RolloutSearch(text=pattern, regex=True))
            assert time.thread_time() - began < 0.5, pattern
        began = time.perf_counter()
        hits = search(rows, RolloutSearch(text="(?:.?){999}(?:.?){999}zz", regex=True))
        assert time.perf_counter() - began < 10 and hits.searched < 20_000


def test_reading_changes_nothing(tmp_path: Path):
    writer = ReplayWriter(tmp_path, 2, "a")
    writer.add([rollout(0), rollout(1), rollout(2)])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    follower = RolloutFollower(tmp_path)
    follower.poll()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
