"""Whatever a user hands in, or a model says: an error in a sentence or a typed failure, never a traceback, never a
loss.

Each check is run on a few cases here and on 10,000 in all with ``-m slow``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from replay_rows import fill
from transformers import AutoTokenizer

from configs.loading import load_config
from configs.schema import TaskConfig
from latent_control.text import encode_plain
from pipeline.pages import page
from pipeline.replay.reader import ReplayReader
from pipeline.rl import ledger
from pipeline.runs.events import read_events
from pipeline.runs.layout import METRICS
from pipeline.runs.metrics_log import RunLog, records
from pipeline.storage import checkpoints
from rollout_workers.tasks import build_task
from rollout_workers.tasks.encoding import decode_response, encode_prompt, shortened
from rollout_workers.tasks.protocol import Failure, Prompt, Score

pytest_plugins = ("rl_fixtures",)
pytestmark = pytest.mark.timeout(3000)

LONG = 10_000
SHARES = {
    "config": 0.3,
    "rows": 0.15,
    "shard": 0.1,
    "checkpoint": 0.1,
    "books": 0.1,
    "prompts": 0.1,
    "verifiers": 0.1,
    "rewards": 0.05,
}
"""Of the cases, by check; they sum to 1."""
HOSTILE = st.one_of(
    st.text(max_size=200),
    st.sampled_from(
        [
            "",
            "\x00",
            "\ud800",
            "</script><script>alert(1)</script>",
            "<|endoftext|>" * 50,
            "__import__('os').system('true')",
            "9" * 5000,
            "1e999",
            "-inf",
            "nan",
            "(" * 3000,
            "\\frac{1}{0}",
            "\u202e\u0000\ufeff",
            "../../etc/passwd",
            "a" * 100_000,
        ]
    ),
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), HOSTILE)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)


def fuzz(share: str, long: bool) -> Callable[[Any], Any]:
    """Hypothesis' settings for a check: as many cases as are its share."""
    cases = int(LONG * SHARES[share]) if long else max(10, int(200 * SHARES[share]))
    return settings(
        max_examples=cases, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )


def mutated(data: bytes, draw: st.DataObject) -> bytes:
    """Bytes with some flipped, cut out or put in."""
    changed = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        place = draw.draw(st.integers(0, max(0, len(changed) - 1)))
        how = draw.draw(st.sampled_from(["flip", "cut", "insert", "truncate"]))
        if how == "flip" and changed:
            changed[place] ^= draw.draw(st.integers(1, 255))
        elif how == "cut":
            del changed[place : place + draw.draw(st.integers(1, 40))]
        elif how == "insert":
            changed[place:place] = draw.draw(st.binary(max_size=20))
        else:
            del changed[place:]
    return bytes(changed)


LENGTHS = [False, pytest.param(True, marks=pytest.mark.slow)]
ids = ["short", "long"]


def leaves(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every dotted place of a config."""
    found = [path] if path else []
    if isinstance(tree, dict):
        for key, value in tree.items():
            found += leaves(value, (*path, key))
    return found


@pytest.mark.parametrize("long", LENGTHS, ids=ids)
def test_configs(tmp_path: Path, long: bool) -> None:
    """A quickstart with values of every kind in every place, as YAML, as override, or with broken bytes."""
    original = Path(__file__).resolve().parents[2].joinpath("configs", "quickstart.yaml").read_text()
    places = leaves(yaml.safe_load(original))
    path = tmp_path / "config.yaml"

    @fuzz("config", long)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        overrides: list[str] = []
        kind = data.draw(st.sampled_from(["value", "override", "bytes", "key"]))
        if kind == "bytes":
            path.write_bytes(mutated(original.encode(), data))
        else:
            tree = yaml.safe_load(original)
            place, value = data.draw(st.sampled_from(places)), data.draw(VALUES)
            if kind == "override":
                overrides = [f"{'.'.join(place)}={value}"]
            else:
                node = tree
                for key in place[:-1]:
                    node = node[key]
                if kind == "value":
                    node[place[-1]] = value
                else:
                    node[data.draw(st.text(max_size=20))] = value
            path.write_text(json.dumps(tree))
        try:
            load_config(path, overrides)
        except ValueError as error:  # ConfigErrors, and what else becomes a sentence on the command line
            assert str(error)

    check()


@pytest.mark.parametrize("long", LENGTHS, ids=ids)
def test_rows(tmp_path: Path, long: bool) -> None:
    """A JSONL file of good rows with one bad line, or broken bytes."""
    good = "".join(json.dumps({"prompt": f"{i} + 1", "answer": str(i + 1)}) + "\n" for i in range(8)).encode()
    path = tmp_path / "rows.jsonl"

    @fuzz("rows", long)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        line = data.draw(st.one_of(st.binary(max_size=60), VALUES.map(lambda value: json.dumps(value).encode())))
        path.write_bytes(mutated(good, data) if data.draw(st.booleans()) else good + line + b"\n" + good)
        try:
            task = build_task(TaskConfig(name="jsonl", options={"path": str(path), "verifier": "exact"}))
            prompts = [*task.prompts("train"), *task.prompts("heldout")]
        except ValueError as error:
            assert str(path) in str(error) or "task" in str(error)
            return
        assert all(isinstance(task.score(prompt, prompt.text), Score | Failure) for prompt in prompts)

    check()


@pytest.mark.parametrize("long", LENGTHS, ids=ids)
def test_shards(tmp_path: Path, long: bool) -> None:
    """A shard with broken bytes is put aside, and the good one beside it is read."""
    replay_folder = tmp_path / "whole"
    fill(replay_folder, 32)
    shards = sorted(replay_folder.glob("run=*/part-*.parquet"))
    name = shards[0].relative_to(replay_folder)
    whole = {row["rollout_id"] for row in ReplayReader(replay_folder, shuffle=False).rows()}

    @fuzz("shard", long)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        folder = tmp_path / "replay"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(replay_folder, folder)
        changed = mutated(shards[0].read_bytes(), data)
        (folder / name).write_bytes(changed)
        reader = ReplayReader(folder, shuffle=False)
        found = {row["rollout_id"] for row in reader.rows()}
        if changed == shards[0].read_bytes():
            assert found == whole
        else:
            assert (
                [one.shard for one in reader.quarantined] == [str(name)]
                and found < whole
                and len(found) == len(whole) // 2
            )

    check()


@pytest.mark.parametrize("long", LENGTHS, ids=ids)
def test_checkpoints(tmp_path: Path, long: bool) -> None:
    """A checkpoint with broken bytes is known to be one, whichever file it is; reading it raises nothing but
    ``ValueError``."""
    tree = {"a": np.arange(5.0), "b": [1, "x", {"c": np.ones((2, 2), np.float32)}]}
    checkpoints.write(
        tmp_path / "t-00000001", files=lambda f: checkpoints.save_tree(f, "t", tree), info={"stage": "t", "update": 1}
    )
    names = sorted(path.name for path in (tmp_path / "t-00000001").iterdir())

    @fuzz("checkpoint", long)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        folder = tmp_path / "t-00000002"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "t-00000001", folder)
        path = folder / data.draw(st.sampled_from(names))
        changed = mutated(path.read_bytes(), data)
        same = changed == path.read_bytes()
        path.write_bytes(changed)
        assert bool(checkpoints.verify(folder)) is not same
        assert checkpoints.newest_valid(tmp_path, "t")[0] == (folder if same else tmp_path / "t-00000001")
        try:
            checkpoints.load_tree(folder, "t")
        except ValueError as error:
            assert "cannot read the tree 't'" in str(error)

    check()


@pytest.mark.parametrize("long", LENGTHS, ids=ids)
def test_ledger_metrics_and_events(tmp_path: Path, long: bool) -> None:
    """Books with broken bytes: what cannot be trusted is left out and said."""
    (tmp_path / "run").mkdir()
    log = RunLog(tmp_path / "run", quiet=True)
    for step in range(1, 6):
        log.log("improve", step, {"reward": step / 7, "loss": float("nan")})
    log.message("worker 1 was lost", "worker_lost", worker=1)
    log.close()
    book = ledger.Ledger(tmp_path / "run", "improve")
    book.begin(0)
    book.add(
        [
            ledger.Attempt(
                position=0, attempt=0, prompt_index=3, outcome="trained", update=1, request=0, worker=1, rollouts=("a",)
            )
        ]
    )
    book.flush(5, {0: "x", 5: "y"}, [])
    files = [
        METRICS,
        "events.jsonl",
        *(str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run" / "ledger").rglob("*") if p.is_file()),
    ]
    written = {int(record["step"]): record for record in records(tmp_path / "run" / METRICS)}

    @fuzz("books", long)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        folder = tmp_path / "hurt"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "run", folder)
        path = folder / data.draw(st.sampled_from(files))
        changed = mutated(path.read_bytes(), data)
        same = changed == path.read_bytes()
        path.write_bytes(changed)
        assert all(written[int(record["step"])] == record for record in records(folder / METRICS)), (
            "a changed number passed"
        )
        read_events(folder)
        found = ledger.read(folder, "improve")
        assert same or path.suffix != ".parquet" or found.problems

    check()


@pytest.mark.parametrize("long", LENGTHS, ids=ids)
def test_prompts_and_pages(tiny_base: Path, long: bool) -> None:
    """Any text is encoded, cut and decoded; no text gets out of its place in a page."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)

    @fuzz("prompts", long)
    @given(text=HOSTILE, most=st.integers(1, 30))
    def check(text: str, most: int) -> None:
        ids = encode_prompt(tokenizer, Prompt(id="x", text=text, metadata={}), chat=False)
        assert all(0 <= token < len(tokenizer) for token in ids) and isinstance(decode_response(tokenizer, ids), str)
        assert len(encode_plain(tokenizer, shortened(tokenizer, text, most), add_special_tokens=False)) <= most
        assert "<" not in page.embedded([{"text": text}]) and page.embedded([{"text": text}]).isascii()

    check()


@pytest.mark.parametrize("long", LENGTHS, ids=ids)
def test_verifiers(tmp_path: Path, long: bool) -> None:
    """Model output is hostile text to every verifier: a score with a finite reward, or a typed failure."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"what is {i}?", "answer": f"{i}"}) + "\n" for i in range(40)))
    options = {"path": str(path)}
    tasks = [build_task(TaskConfig(name="countdown", options={}))]
    tasks += [
        build_task(TaskConfig(name="jsonl", options=options | {"verifier": name}))
        for name in ("exact", "contains", "number")
    ]

    @fuzz("verifiers", long)
    @given(text=HOSTILE, number=st.integers(0, 20), which=st.integers(0, len(tasks) - 1))
    def check(text: str, number: int, which: int) -> None:
        verdict = tasks[which].score(tasks[which].prompts("train")[number], text)
        assert (isinstance(verdict, Failure) and verdict.kind and verdict.message) or np.isfinite(verdict.reward)

    check()


REWARD = """
import json

def reward(row, response):
    value = json.loads(response)
    print(value)
    if isinstance(value, str):
        raise {0: KeyError, 1: SystemExit, 2: RecursionError, 3: BaseException}[len(value) % 4](value)
    return value
"""


@pytest.mark.parametrize("long", LENGTHS, ids=ids)
def test_reward_functions(tmp_path: Path, long: bool) -> None:
    """One that returns or raises anything: a finite reward or a typed failure for that response, and the right one for
    its neighbours."""
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i}?", "answer": f"{i}"}) + "\n" for i in range(20))
    )
    options = {
        "path": str(tmp_path / "rows.jsonl"),
        "verifier": "python",
        "python": {"path": str(tmp_path / "reward.py")},
    }
    task = build_task(TaskConfig(name="jsonl", options=options))
    prompt = task.prompts("train")[0]

    @fuzz("rewards", long)
    @given(value=VALUES)
    def check(value: Any) -> None:
        before, verdict, after = task.score_batch([prompt] * 3, ["0.25", json.dumps(value), "0.5"])
        assert isinstance(before, Score) and isinstance(after, Score) and (before.reward, after.reward) == (0.25, 0.5)
        assert (isinstance(verdict, Failure) and verdict.kind and verdict.message) or np.isfinite(verdict.reward)

    check()
