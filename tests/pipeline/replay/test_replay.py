"""The replay buffer: every row back exactly once, readable by others, damage named and put aside."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from replay_rows import fill, rollout

from pipeline.replay.actor import ReplayActor
from pipeline.replay.reader import ReplayReader, _take
from pipeline.replay.schema import SCHEMA, SCHEMA_VERSION
from pipeline.replay.writer import Added, ReplayWriter, to_table
from pipeline.storage.atomic import sha256_file, unseal
from rollout_workers.rollouts import Rollout

UNSTORED = {"decode", "features", "baseline", "event_logp", "events", "rescored_logp"}


def ids(rows: Iterable[dict]) -> list[int]:
    return [int(row["rollout_id"].removeprefix("run/")) for row in rows]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("run=*/*.parquet"))


def test_every_column_comes_back_exactly(tmp_path: Path) -> None:
    failed = rollout(3, reward=None, reward_parts={}, failure="verifier_error: boom: twice", success=False)
    empty = rollout(7, tokens=np.empty(0, np.int32), actions=np.empty(0, np.int32), action_logp=np.empty(0, np.float32))
    given = [rollout(0), failed, empty, rollout(9, reward=float("nan"))]
    writer = ReplayWriter(tmp_path, 100, "a")
    assert writer.add(given) == Added(rows=4, duplicates=0)
    writer.close()
    read = list(ReplayReader(tmp_path, shuffle=False).rows())
    assert len(read) == 4
    for one, row in zip(given, read, strict=True):
        for field in fields(Rollout):
            if field.name in UNSTORED:
                assert field.name not in row
                continue
            want, got = getattr(one, field.name), row[field.name]
            if isinstance(want, np.ndarray):
                assert got.dtype == want.dtype
                assert np.array_equal(want, got)
            elif field.name == "created":
                assert got.timestamp() == want
            else:
                assert got == want or (got != got and want != want)
        assert (row["prompt_length"], row["length"]) == (len(one.prompt_tokens), len(one.tokens))
    assert [row["failure_kind"] for row in read] == [None, "verifier_error", None, None]


def test_shuffled_tables_hold_what_pyarrow_would_take() -> None:
    table = to_table([rollout(i, reward_parts={"part": i} if i % 3 else {}) for i in range(40)])
    order = pa.array(np.random.default_rng(0).permutation(20))
    for part in (table.slice(0, 20), table.slice(13, 20), table.select(["tokens"]).slice(5, 20)):
        assert _take(part, order).equals(part.take(order))
        assert _take(part, order[:0]).equals(part.take(order[:0]))
    assert _take(table[:0], order[:0]).equals(table[:0])
    assert _take(pa.concat_tables([table, table]), order).equals(table.take(order))


def test_many_more_shards_than_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.replay.reader.OPEN_FILES", 2)
    fill(tmp_path, 60, rows_per_shard=5)
    assert sorted(ids(ReplayReader(tmp_path).rows())) == list(range(60))


def test_schema_is_documented_and_versioned(tmp_path: Path) -> None:
    fill(tmp_path, 16)
    schema = pq.read_schema(shards(tmp_path)[0])
    assert all(len(field.metadata[b"doc"]) > 8 for field in schema)
    about = json.loads(schema.metadata[b"latent_control.replay"])
    assert about["schema_version"] == SCHEMA_VERSION
    assert about["policy_hashes"] == ["p0", "p1"]
    assert (about["world_hashes"], about["codebook_hashes"], about["run_id"]) == (["w"], ["c"], "a")
    assert {f.name for f in fields(Rollout)} - UNSTORED <= set(SCHEMA.names)


def test_others_can_read_it(tmp_path: Path) -> None:
    fill(tmp_path / "replay", 40, run_id="a")
    fill(tmp_path / "replay", 10, run_id="b ü[1]", first=100)
    (tmp_path / "replay" / "_quarantine").mkdir()
    frame = pd.read_parquet(tmp_path / "replay")
    assert len(frame) == 50
    assert sorted(frame["run"].unique()) == ["a", "b ü[1]"]
    assert dict(frame.loc[frame.rollout_id == "run/3", "reward_parts"].item()) == {"format": 1.0, "success": 1.0}
    assert str(frame["created"].dtype).startswith("datetime64[us, UTC")
    assert frame["reward"].mean() == pytest.approx(np.mean([i % 4 / 2 for i in [*range(40), *range(100, 110)]]))


def test_shards_row_groups_and_manifest(tmp_path: Path) -> None:
    writer = ReplayWriter(tmp_path, 600, "a")
    for first in range(0, 1300, 100):
        writer.add([rollout(i) for i in range(first, first + 100)])
    assert [pq.read_metadata(path).num_rows for path in shards(tmp_path)] == [600, 600]
    assert writer.rows == 1300
    writer.close()
    writer.close()
    footers = [pq.read_metadata(path) for path in shards(tmp_path)]
    assert [footer.num_rows for footer in footers] == [600, 600, 100]
    assert [footers[0].row_group(i).num_rows for i in range(3)] == [256, 256, 88]
    assert footers[0].row_group(0).column(0).compression == "ZSTD"
    entries = unseal(tmp_path / "run=a" / "_manifest.json")["shards"]
    assert [entry["name"] for entry in entries] == [path.name for path in shards(tmp_path)]
    assert [(e["rows"], e["min_policy_version"], e["max_policy_version"]) for e in entries] == [
        (600, 0, 74),
        (600, 75, 149),
        (100, 150, 162),
    ]
    assert not list((tmp_path / "run=a").glob(".*"))


def test_a_row_delivered_twice_is_stored_once_also_after_reopening(tmp_path: Path) -> None:
    writer = fill(tmp_path, 20)
    assert writer.add([rollout(19), rollout(20), rollout(20)]) == Added(rows=1, duplicates=2)
    writer.close()
    again = ReplayWriter(tmp_path, 16, "a")
    assert again.rows == 21
    assert again.add([rollout(i) for i in range(30)]) == Added(rows=9, duplicates=21)
    again.close()
    assert sorted(ids(ReplayReader(tmp_path).rows())) == list(range(30))
    assert [path.name[:13] for path in shards(tmp_path)] == [f"part-{i:08d}" for i in range(4)]


def test_unequal_lengths_are_refused_and_nothing_is_taken(tmp_path: Path) -> None:
    writer = ReplayWriter(tmp_path, 16, "a")
    with pytest.raises(ValueError, match=r"rollout run/5: .* lengths \(6, 5, 6\)"):
        writer.add([rollout(4), rollout(5, actions=np.zeros(5, np.int32))])
    assert writer.rows == 0
    assert writer.add([rollout(4)]) == Added(rows=1, duplicates=0)


@pytest.mark.parametrize(
    ("rows_per_shard", "run_id", "words"), [(0, "a", "rows_per_shard is 0"), (1, "../x", "run_id is '../x'")]
)
def test_bad_arguments(tmp_path: Path, rows_per_shard: int, run_id: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ReplayWriter(tmp_path, rows_per_shard, run_id)


def test_a_failed_write_keeps_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ReplayWriter(tmp_path, 16, "a")
    with monkeypatch.context() as patch:

        def full(path: Path) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr("pipeline.replay.writer.fsync_file", full)
        with pytest.raises(OSError, match="No space"):
            writer.add([rollout(i) for i in range(20)])
    writer.close()
    assert sorted(ids(ReplayReader(tmp_path).rows())) == list(range(20))


def test_killed_between_rename_and_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 16)
    writer = ReplayWriter(tmp_path, 16, "a")
    monkeypatch.setattr(ReplayWriter, "_write_manifest", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        writer.add([rollout(i) for i in range(16, 32)])
    monkeypatch.undo()
    (tmp_path / "run=a" / ".part-00000002.tmp").write_bytes(b"half")
    assert len(shards(tmp_path)) == 2
    reader = ReplayReader(tmp_path)
    assert sorted(ids(reader.rows())) == list(range(32))
    assert reader.quarantined == ()
    again = ReplayWriter(tmp_path, 16, "a")
    assert again.add([rollout(i) for i in range(48)]) == Added(rows=16, duplicates=32)
    assert len(unseal(tmp_path / "run=a" / "_manifest.json")["shards"]) == 3
    assert not list((tmp_path / "run=a").glob(".*"))


def test_shuffling_is_seeded_and_epochs_differ(tmp_path: Path) -> None:
    fill(tmp_path, 3000, rows_per_shard=700)
    one = ids(ReplayReader(tmp_path, seed=1).rows())
    assert sorted(one) == list(range(3000))
    assert one == ids(ReplayReader(tmp_path, seed=1).rows())
    assert one != ids(ReplayReader(tmp_path, seed=2).rows())
    assert one != ids(ReplayReader(tmp_path, seed=1).rows(epoch=1))
    assert np.mean(np.abs(np.diff(one)) > 256) > 0.5, "neighbours come from different row groups"
    assert ids(ReplayReader(tmp_path, shuffle=False).rows()) == list(range(3000))


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_share_the_rows_without_overlap(tmp_path: Path, world: int) -> None:
    fill(tmp_path, 3000, rows_per_shard=700)
    parts = [ids(ReplayReader(tmp_path, seed=4, rank=rank, world=world).rows()) for rank in range(world)]
    assert sorted(i for part in parts for i in part) == list(range(3000))
    assert all(parts)


def test_projection_and_filter(tmp_path: Path) -> None:
    fill(tmp_path, 40)
    writer = ReplayWriter(tmp_path, 16, "a")
    writer.add([rollout(40, reward=None, failure="timeout: 3 s")])
    writer.close()
    rows = list(ReplayReader(tmp_path, columns=["rollout_id", "actions"], min_reward=1.0).rows())
    assert sorted(ids(rows)) == [i for i in range(40) if i % 4 >= 2]
    assert set(rows[0]) == {"rollout_id", "actions"}
    assert list(ReplayReader(tmp_path, min_reward=9.0).batches()) == []
    with pytest.raises(ValueError, match="no column return; it has rollout_id"):
        ReplayReader(tmp_path, columns=["return"])


def test_batches_are_bounded(tmp_path: Path) -> None:
    fill(tmp_path, 1000, rows_per_shard=1000)
    sizes = [len(batch) for batch in ReplayReader(tmp_path, batch_size=100, window=2).batches()]
    assert max(sizes) == 100
    assert sum(sizes) == 1000


def test_it_finds_the_folder(tmp_path: Path) -> None:
    fill(tmp_path / "replay", 5)
    for folder in (tmp_path, tmp_path / "replay", tmp_path / "replay" / "run=a"):
        assert sorted(ids(ReplayReader(folder).rows())) == list(range(5))
    fill(tmp_path / "replay", 3, run_id="b", first=5)  # as a run whose token level has rollouts, too
    assert sorted(ids(ReplayReader(tmp_path / "replay" / "run=b").rows())) == [5, 6, 7]
    with pytest.raises(ValueError, match="is not a folder; give a run folder"):
        ReplayReader(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="rank 2 of 2"):
        ReplayReader(tmp_path, rank=2, world=2)


def flip_bit(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def foreign(path: Path, **metadata: object) -> None:
    table = pa.table({"x": [1]})
    if metadata:
        table = table.replace_schema_metadata({"latent_control.replay": json.dumps(metadata)})
    pq.write_table(table, path)
    path.rename(path.with_name(f"part-00000009-{sha256_file(path)[:8]}.parquet"))


def wrong_run(folder: Path) -> None:
    fill(folder / "other", 3, run_id="b", first=500)
    (source,) = (folder / "other" / "run=b").glob("*.parquet")
    shutil.move(source, folder / "run=a" / source.name.replace("00000000", "00000009"))
    shutil.rmtree(folder / "other")


DAMAGE: dict[str, tuple[Callable[[Path], object], str, bool]] = {
    "flipped bit in the data": (lambda f: flip_bit(shards(f)[1], 0.2), "its SHA-256 is", True),
    "flipped bit in the footer": (lambda f: flip_bit(shards(f)[1], 1.0), "its SHA-256 is", True),
    "truncated": (lambda f: os.truncate(shards(f)[1], 100), "its SHA-256 is", True),
    "emptied": (lambda f: os.truncate(shards(f)[1], 0), "its SHA-256 is", True),
    "missing": (lambda f: shards(f)[1].unlink(), "it is missing; the manifest lists it with 16 rows", True),
    "foreign name": (lambda f: shutil.copy(shards(f)[0], f / "run=a" / "mine.parquet"), "its name is not part-", False),
    "foreign place": (
        lambda f: shutil.copy(shards(f)[0], f / "mine.parquet"),
        "outside of the run=<id> folders",
        False,
    ),
    "no Parquet": (
        lambda f: (f / "run=a" / "part-00000009-2d711642.parquet").write_bytes(b"x"),
        "not a readable Parquet file",
        False,
    ),
    "foreign schema": (lambda f: foreign(f / "run=a" / "x.parquet"), "carries no replay schema", False),
    "later schema": (
        lambda f: foreign(f / "run=a" / "x.parquet", schema_version=6),
        "schema version 6, this version reads 2, 3, 4, 5",
        False,
    ),
    "other columns": (
        lambda f: foreign(f / "run=a" / "x.parquet", schema_version=2, run_id="a"),
        "not those of the replay schema",
        False,
    ),
    "of another run": (wrong_run, "belongs to run 'b', not to 'a'", False),
}


# A writer looks at its own partition only.
@pytest.mark.parametrize(
    ("opener", "kind"), [(o, k) for o in ("reader", "writer") for k in DAMAGE if (o, k) != ("writer", "foreign place")]
)
def test_damage_is_named_and_put_aside(
    tmp_path: Path, kind: str, opener: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, 48)
    damage, words, hits_a_shard = DAMAGE[kind]
    damage(tmp_path)
    with caplog.at_level(logging.WARNING):
        opened = ReplayReader(tmp_path) if opener == "reader" else ReplayWriter(tmp_path, 16, "a")
    assert len(opened.quarantined) == 1
    found = opened.quarantined[0]
    assert words in found.reason
    assert found.shard in caplog.text
    if kind == "missing":
        assert found.moved_to is None
    else:
        assert found.moved_to.is_file()
        assert words in found.moved_to.with_name(f"{found.moved_to.name}.reason.txt").read_text()
    whole = [i for i in range(48) if not (hits_a_shard and 16 <= i < 32)]
    assert sorted(ids(ReplayReader(tmp_path).rows())) == whole
    assert len(pd.read_parquet(tmp_path)) == len(whole)
    again = ReplayWriter(tmp_path, 16, "a")
    assert again.add([rollout(i) for i in range(48)]).rows == 48 - len(whole)
    again.close()
    assert sorted(ids(ReplayReader(tmp_path).rows())) == list(range(48))
    lost = unseal(tmp_path / "run=a" / "_manifest.json")["lost"]
    assert [words in entry["reason"] or "missing" in entry["reason"] for entry in lost] == [True] * (
        hits_a_shard or opener == "writer"
    )


def test_a_damaged_manifest_loses_no_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, 48)
    flip_bit(tmp_path / "run=a" / "_manifest.json", 0.5)
    reader = ReplayReader(tmp_path)
    assert "_manifest.json" in caplog.text
    assert sorted(ids(reader.rows())) == list(range(48))
    ReplayWriter(tmp_path, 16, "a")
    caplog.clear()
    assert ReplayReader(tmp_path).rows_stored == 48
    assert caplog.text == ""


def test_a_read_only_buffer_is_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 32)
    flip_bit(shards(tmp_path)[0], 0.5)

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    reader = ReplayReader(tmp_path)
    assert sorted(ids(reader.rows())) == list(range(16, 32))
    assert [q.moved_to for q in reader.quarantined] == [None]


def test_actor_stores_what_is_behind_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    from ray.exceptions import OwnerDiedError

    def get(ref: object) -> list[Rollout]:
        if ref == "gone":
            raise OwnerDiedError("ff", "addr", "")
        return [rollout(i) for i in ref]

    monkeypatch.setattr(ray, "get", get)
    actor = ReplayActor(tmp_path, 16, "a")
    added = actor.add([range(10), "gone", range(5, 20)])
    assert (added.rows, added.duplicates, len(added.lost)) == (20, 5, 1)
    assert (
        actor.flush().rows == 20 and actor.flush().actor == added.actor != ReplayActor(tmp_path, 16, "a").flush().actor
    )
    assert sorted(ids(ReplayReader(tmp_path).rows())) == list(range(20))


def test_outcomes_of_an_evaluation_come_back(tmp_path: Path) -> None:
    from pipeline.evaluation.outcome_file import write_outcomes
    from pipeline.evaluation.outcomes import Outcome

    common = {
        "variant": "base",
        "mode": "sampled",
        "prompt_id": "t/heldout/3",
        "response": "a",
        "prompt": "q",
        "new_tokens": 2,
    }
    judged = Outcome(**common, sample=0, success=True, reward=0.5, reward_parts={"form": 1.0, "sum": 0.0})
    failed = Outcome(**common, sample=1, success=False, reward=None, reward_parts={})
    write_outcomes(tmp_path / "e.parquet", [judged, failed])
    table = pd.read_parquet(tmp_path / "e.parquet")
    assert list(table.columns) == list(Outcome.__dataclass_fields__)
    assert table["sample"].tolist() == [0, 1] and table.success.tolist() == [True, False]
    assert table.reward[0] == 0.5 and pd.isna(table.reward[1])
    assert [dict(parts) for parts in table.reward_parts] == [{"form": 1.0, "sum": 0.0}, {}]
