"""Data streams: a batch is a function of (seed, update), whoever reads it, and bad rows are named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from configs.schema import DataSource
from latent_control.records import TokenBatch
from learners.base_training import word_tokenizer
from pipeline.data.batches import heldout_batches, training_batches
from pipeline.data.text_files import read_texts
from pipeline.replay.writer import ReplayWriter
from rollout_workers.rollouts import Rollout
from rollout_workers.tasks.countdown import Countdown
from rollout_workers.tasks.encoding import decode_response


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer([*Countdown.words, *(f"w{i}" for i in range(3000))])


@pytest.fixture
def settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {"task": Countdown(), "tokenizer": tokenizer, "chat": False, "batch_size": 12, "max_length": 40, "seed": 5}


def rows_of(batch: TokenBatch) -> list[tuple[int, ...]]:
    """Token ids of each row without padding; checks that the masks fit."""
    assert batch.input_ids.dtype == torch.int64
    assert batch.attention_mask.dtype == torch.int64
    assert batch.response_mask.dtype == torch.bool
    lengths = batch.attention_mask.sum(1)
    assert int(lengths.max()) == batch.input_ids.shape[1], "padded to the longest row"
    assert torch.equal(batch.attention_mask, (torch.arange(batch.input_ids.shape[1]) < lengths[:, None]).long())
    assert not (batch.response_mask & (batch.attention_mask == 0)).any()
    return [tuple(row[:n].tolist()) for row, n in zip(batch.input_ids, lengths.tolist(), strict=True)]


def some(batches: Iterator[TokenBatch], count: int) -> list[list[tuple[int, ...]]]:
    return [rows_of(batch) for batch in islice(batches, count)]


def numbered(tokenizer: PreTrainedTokenizerFast, rows: list[list[tuple[int, ...]]]) -> list[int]:
    """The number i of each row whose text is 'w<i>'."""
    first = tokenizer.convert_tokens_to_ids("w0")
    return [row[1] - first for batch in rows for row in batch]


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return path


def write_replay(folder: Path, count: int, prompts: int = 20, said: str = "") -> Path:
    writer = ReplayWriter(folder / "replay", 50, "a")
    for i in range(count):
        tokens = np.array([10 + i % 100, 2], np.int32)
        names = ("group_id", "prompt_text", "text", "policy_hash", "world_hash", "codebook_hash")
        made = Rollout(
            rollout_id=f"r{i}",
            prompt_id=f"p{i % prompts}",
            prompt_tokens=np.arange(1, 4 + i % 3, dtype=np.int32),
            tokens=tokens,
            actions=tokens,
            action_logp=np.zeros(2, np.float32),
            finish_reason="stop",
            reward=i % 2,
            reward_parts={},
            success=False,
            failure=None,
            policy_version=0,
            level="latent",
            seed=0,
            worker=1,
            created=0.0,
            **dict.fromkeys(names, "") | {"text": said and f"{said}{10 + i % 100}"},
        )
        writer.add([made])
    writer.close()
    return folder


@pytest.fixture
def mix(tmp_path: Path) -> list[DataSource]:
    texts = write_jsonl(tmp_path / "texts" / "a.jsonl", [f"w{i} " * (1 + i % 90) for i in range(150)])
    replay = write_replay(tmp_path / "run", 130)
    return [
        DataSource(kind="task", weight=1.0),
        DataSource(kind="text", path=str(texts), weight=2.0),
        DataSource(kind="replay", path=str(replay), weight=1.0),
    ]


def test_demonstrations_have_prompt_response_and_end_token(
    settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    batch = next(training_batches([DataSource()], **settings))
    assert batch.input_ids.shape[0] == 12
    for ids, response in zip(rows_of(batch), batch.response_mask, strict=True):
        start = int(response.nonzero()[0])
        assert response[start : len(ids)].all()
        assert ids[-1] == tokenizer.eos_token_id
        prompt, answer = tokenizer.decode(ids[1:start]), decode_response(tokenizer, ids[start:])
        assert prompt.endswith(":")
        assert prompt.split("->")[0].split() == [w for w in prompt.split("->")[0].split() if w.isdigit()]
        assert "=" in answer


def test_batches_depend_on_seed_and_update_alone(settings: dict[str, Any], mix: list[DataSource]) -> None:
    once = some(training_batches(mix, **settings), 60)
    assert once == some(training_batches(mix, **settings), 60)
    assert once != some(training_batches(mix, **(settings | {"seed": 6})), 60)
    flat = [row for batch in once for row in batch]
    assert len(set(flat)) > 200


@pytest.mark.parametrize("start", [1, 7, 40, 59])
def test_resuming_is_exact(settings: dict[str, Any], mix: list[DataSource], start: int) -> None:
    whole = some(training_batches(mix, **settings), 64)
    assert some(training_batches(mix, **settings, start=start), 64 - start) == whole[start:]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_together_have_the_global_batch(settings: dict[str, Any], mix: list[DataSource], world: int) -> None:
    whole = some(training_batches(mix, **settings, start=5), 40)
    parts = [some(training_batches(mix, **settings, start=5, rank=rank, world=world), 40) for rank in range(world)]
    assert [[row for part in parts for row in part[i]] for i in range(40)] == whole
    assert {len(batch) for part in parts for batch in part} == {12 // world}


def test_weights_set_the_shares(settings: dict[str, Any], mix: list[DataSource]) -> None:
    rows = [row for batch in some(training_batches(mix, **(settings | {"batch_size": 100})), 30) for row in batch]
    text = sum(str(settings["tokenizer"].decode([row[-2]])).startswith("w") for row in rows)
    assert text / len(rows) == pytest.approx(0.5, abs=0.05)


def test_a_pass_gives_each_training_row_once_and_the_next_another_order(
    tmp_path: Path, settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.sources.SHUFFLE_WINDOWS", 50)
    for name, first in (("b/x.jsonl", 0), ("a.jsonl", 100), ("c.jsonl", 200)):
        write_jsonl(tmp_path / "t" / name, [f"w{i}" for i in range(first, first + 100)])
    source = [DataSource(kind="text", path=str(tmp_path / "t"))]
    held = numbered(tokenizer, [rows_of(b) for b in heldout_batches(source, **settings, count=1000)])
    assert 6 <= len(held) <= 12
    size = 300 - len(held)
    two = numbered(tokenizer, some(training_batches(source, **(settings | {"batch_size": size})), 2))
    assert sorted(two[:size]) == sorted(set(range(300)) - set(held))
    assert sorted(two[size:]) == sorted(two[:size])
    assert two[:size] != two[size:]
    assert two[:20] != sorted(two[:20])


def test_whole_passes_are_not_read_again_when_resuming(
    tmp_path: Path, settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = [DataSource(kind="text", path=str(write_jsonl(tmp_path / "a.jsonl", [f"w{i}" for i in range(33)])))]
    whole = some(training_batches(source, **settings), 900)
    opened: list[Path] = []
    monkeypatch.setattr(
        "pipeline.data.sources.read_texts", lambda path, column: opened.append(path) or read_texts(path, column)
    )
    assert some(training_batches(source, **settings, start=890), 10) == whole[890:]
    assert len(opened) < 10, "890 updates of 12 rows are 344 passes over 31 rows"


def test_long_texts_become_windows(
    tmp_path: Path, settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    words = [f"w{i}" for i in range(100)]
    path = write_jsonl(tmp_path / "a.jsonl", [" ".join(words), "", "  ", "w5"])
    source = [DataSource(kind="text", path=str(path))]
    (held,) = heldout_batches(source, **settings, count=8)
    pieces = some(training_batches(source, **(settings | {"batch_size": 3})), 1)[0]
    assert bool((held.response_mask == (held.attention_mask == 1)).all())
    first = rows_of(held)[0]
    assert len(first) == 40
    others = sorted(pieces, key=len)
    assert [len(row) for row in others] == [3, 22, 40]
    whole = [i for row in (first, others[2], others[1]) for i in row]
    assert whole == [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(words), tokenizer.eos_token_id]


def test_demonstrations_are_cut_on_the_right(settings: dict[str, Any]) -> None:
    rows = some(training_batches([DataSource()], **(settings | {"max_length": 12})), 3)
    whole = some(training_batches([DataSource()], **settings), 3)
    assert rows == [[row[:12] for row in batch] for batch in whole]
    with pytest.raises(
        ValueError, match=r"demonstration countdown/train/\d+: its prompt has 7 tokens and max_length is 5.*more than 7"
    ):
        next(training_batches([DataSource()], **(settings | {"max_length": 5})))


def test_replay_rows_are_prompt_and_generated_tokens(tmp_path: Path, settings: dict[str, Any]) -> None:
    source = [DataSource(kind="replay", path=str(write_replay(tmp_path / "run", 100)), min_reward=1.0)]
    (held,) = heldout_batches(source, **(settings | {"batch_size": 50}), count=50)
    size = 50 - len(held.input_ids)
    batch = next(training_batches(source, **(settings | {"batch_size": size})))
    rows = rows_of(batch) + rows_of(held)
    assert sorted(row[-2] for row in rows) == [10 + i for i in range(1, 100, 2)]
    for row, response in zip(rows_of(batch), batch.response_mask, strict=True):
        prompt = len(row) - 2
        assert row[:prompt] == tuple(range(1, prompt + 1))
        assert response.nonzero().flatten().tolist() == [prompt, prompt + 1]


def test_rollouts_of_another_tokenizer_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Their ids are other words here: the stages learned those without a word."""
    path, own = tmp_path / "run", tmp_path / "own"
    source = [DataSource(kind="replay", path=str(write_replay(path, 20, said="zebra")))]
    with pytest.raises(ValueError, match=r"run are of another tokenizer: 'zebra\d\d' reads '.+' with this one"):
        next(training_batches(source, **settings))
    words = word_tokenizer([f"t{number}" for number in range(4, 200)])  # id n is tn
    mine = [DataSource(kind="replay", path=str(write_replay(own, 20, said="t")))]
    next(training_batches(mine, **settings | {"tokenizer": words}))


@pytest.mark.parametrize(("prompts", "shared"), [(1, True), (2, False), (40, False)])
def test_replay_holds_out_whole_prompts(tmp_path: Path, settings: dict[str, Any], prompts: int, shared: bool) -> None:
    source = [DataSource(kind="replay", path=str(write_replay(tmp_path / "run", 80, prompts)))]
    held = {row[-2] - 10 for batch in heldout_batches(source, **settings, count=1000) for row in rows_of(batch)}
    train = {row[-2] - 10 for batch in some(training_batches(source, **settings), 40) for row in batch}
    assert held
    assert ({i % prompts for i in held} & {i % prompts for i in train} != set()) == shared
    assert held | train == set(range(80))


def test_heldout_batches_share_and_size(tmp_path: Path, settings: dict[str, Any], mix: list[DataSource]) -> None:
    whole = heldout_batches(mix, **settings, count=30)
    assert [len(rows_of(batch)) for batch in whole] == [12, 12, 6]
    train = {row for batch in some(training_batches(mix, **settings), 80) for row in batch}
    assert not train & {row for batch in whole for row in rows_of(batch) if len(row) > 6}
    blank = DataSource(kind="text", path=str(write_jsonl(tmp_path / "blank.jsonl", ["  "])))
    with pytest.raises(ValueError, match="holds out no sequence"):
        heldout_batches([blank], **settings, count=3)


def test_parquet_texts_and_folders_of_all_kinds(
    tmp_path: Path, settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = tmp_path / "t"
    write_jsonl(folder / "a.jsonl", [f"w{i}" for i in range(40)], column="body")
    pq.write_table(
        pa.table({"id": range(600), "body": [f"w{i}" for i in range(40, 640)]}),
        folder / "b.parquet",
        row_group_size=100,
    )
    (folder / "c.txt").write_text("\ufeffw640\n\n\n" + "\n\n".join(f"w{i}" for i in range(641, 700)) + "\n")
    (folder / "notes.md").write_text("not read")
    source = [DataSource(kind="text", path=str(folder), column="body")]
    held = numbered(tokenizer, [rows_of(b) for b in heldout_batches(source, **settings, count=1000)])
    train = numbered(tokenizer, some(training_batches(source, **(settings | {"batch_size": 700 - len(held)})), 1))
    assert sorted(train + held) == list(range(700))


def test_paragraphs_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.text_files._BLOCK_CHARACTERS", 20)
    path = tmp_path / "a.txt"
    path.write_text("one line\nsecond line\nthird line\n\n \nlast")
    assert list(read_texts(path, "text")) == ["one line\nsecond line", "third line", "last"]


BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no JSON": (
        "a.jsonl",
        lambda p: p.write_text('{"text": "w1"}\n{"text": \n'),
        r"a.jsonl, line 2: not JSON .*mend or remove",
    ),
    "no object": (
        "a.jsonl",
        lambda p: p.write_text('["w1"]\n'),
        r"a.jsonl, row 1: a JSON object is wanted, not 'w1'",
    ),
    "other key": (
        "a.jsonl",
        lambda p: p.write_text('{"texts": "w1"}\n'),
        r"a.jsonl, line 1: no key 'text'; did you mean column: texts\?",
    ),
    "no text": (
        "a.jsonl",
        lambda p: p.write_text('{"text": 7}\n'),
        r"a.jsonl, line 1: 'text' is 7 \(int\), not a text",
    ),
    "not UTF-8": ("a.jsonl", lambda p: p.write_bytes(b'{"text": "\xff"}\n'), r"a.jsonl, line 1: not UTF-8"),
    "txt not UTF-8": ("a.txt", lambda p: p.write_bytes(b"ok\n\xe9\n"), r"a.txt, line 2: not UTF-8"),
    "empty": (
        "a.jsonl",
        lambda p: p.write_text("\n\n"),
        r"the text source .*a.jsonl gives no training rows; check "
        r"its path",
    ),
    "one window": ("a.txt", lambda p: p.write_text("w1"), r"gives no training rows"),
    "other column": (
        "a.parquet",
        lambda p: pq.write_table(pa.table({"body": ["x"]}), p),
        r"a.parquet, row 1: no key 'text'; it has 'body'; set column",
    ),
    "null": (
        "a.parquet",
        lambda p: pq.write_table(pa.table({"text": ["w1", None]}), p),
        r"a.parquet, row 2: 'text' "
        r"is None",
    ),
    "torn Parquet": ("a.parquet", lambda p: p.write_bytes(b"PAR1half"), r"a.parquet is not a readable Parquet file"),
    "no text file": ("a.docx", lambda p: p.write_text("x"), r"a.docx is or holds no .jsonl, .* .txt file"),
    "not there": ("a.jsonl", lambda p: None, r"a.jsonl does not exist"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_text_is_named(tmp_path: Path, settings: dict[str, Any], kind: str) -> None:
    name, make, words = BAD[kind]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=words):
        next(training_batches([DataSource(kind="text", path=str(tmp_path / name))], **settings))


def test_bad_arguments(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="batch_size 12 does not divide among 5 workers"):
        next(training_batches([DataSource()], **settings, world=5))
    with pytest.raises(ValueError, match="kind 'replay' needs a path"):
        next(training_batches([DataSource(kind="replay")], **settings))
    empty = [DataSource(kind="replay", path=str(write_replay(tmp_path / "run", 20)), min_reward=5.0)]
    with pytest.raises(
        ValueError,
        match=r"the replay source .*run gives no training rows; check its path, column and "
        r"min_reward",
    ):
        next(training_batches(empty, **settings))
