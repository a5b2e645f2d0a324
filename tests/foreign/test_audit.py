"""The audit audits: each part of a finished run, damaged or replaced in one way, is found; whole runs pass."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from run_fixtures import QUICKSTART, call, command
from safetensors.torch import load_file, save_file

from pipeline.integrity.audit import audit
from pipeline.pages.report.write import report
from pipeline.run import resume
from pipeline.runs import manifest
from pipeline.storage.atomic import sealed, unseal
from pipeline.storage.checksummed_jsonl import line

pytest_plugins = ("run_fixtures",)

Damage = Callable[[Path], object]
WEIGHTS = "latent_actions.safetensors"


# -- tools: files are hard links to those of the one run, so they are replaced, never written into ---------------------


def put(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def changed(name: str, change: Callable[[bytes], bytes]) -> Damage:
    """``change`` of the bytes of the one file that ``name`` (a pattern) matches first."""

    def damage(run: Path) -> None:
        path = sorted(run.glob(name))[0]
        put(path, change(path.read_bytes()))

    return damage


def gone(name: str) -> Damage:
    def damage(run: Path) -> None:
        path = sorted(run.glob(name))[-1]
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


def lines(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[bytes], bytes]:
    return lambda data: b"".join(change(data.splitlines(keepends=True)))


def edited(found: list[bytes]) -> list[bytes]:
    """The last line with another number, and a checksum that fits it."""
    record = {name: value for name, value in json.loads(found[-1]).items() if name != "crc32"}
    first = next(name for name, value in record.items() if isinstance(value, float))
    return [*found[:-1], line(record | {first: record[first] + 1.0}).encode()]


def number(*keys: str) -> Callable[[bytes], bytes]:
    """JSON with one number changed."""

    def change(data: bytes) -> bytes:
        content = json.loads(data)
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] += 0.1
        return json.dumps(content, indent=1).encode()

    return change


def replaced(name: str, by: str) -> Damage:
    """Folder ``name`` as a whole copy of folder ``by``."""

    def damage(run: Path) -> None:
        shutil.rmtree(run / name)
        shutil.copytree(run / by, run / name)

    return damage


def exchanged(one: str, other: str) -> Damage:
    def damage(run: Path) -> None:
        (run / one).rename(run / "aside")
        (run / other).rename(run / one)
        (run / "aside").rename(run / other)

    return damage


def resealed(folder: Path) -> None:
    """A checkpoint's manifest that fits whatever lies there now: only the run's own can tell."""
    content = unseal(folder / "manifest.json")
    for name, entry in content["files"].items():
        data = (folder / name).read_bytes()
        entry |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    put(folder / "manifest.json", sealed(content))


def other_tensors(stage: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Damage:
    """The tensors of a result changed, its manifest made to fit."""

    def damage(run: Path) -> None:
        path = run / "checkpoints" / stage / WEIGHTS
        tensors = load_file(path)
        change(tensors)
        path.unlink()
        save_file(tensors, path)
        resealed(path.parent)

    return damage


def two_swapped(tensors: dict[str, torch.Tensor]) -> None:
    shapes: dict[Any, str] = {}
    for name in sorted(tensors):
        shape = tensors[name].shape
        if shape in shapes and not torch.equal(tensors[name], tensors[shapes[shape]]):
            tensors[name], tensors[shapes[shape]] = tensors[shapes[shape]], tensors[name]
            return
        shapes[shape] = name
    raise AssertionError("no two tensors of one shape")


def another_codebook(tensors: dict[str, torch.Tensor]) -> None:
    tensors["codebook"] = tensors["codebook"].roll(1, 0)


def older(tensors: dict[str, torch.Tensor]) -> None:
    name = max((name for name in tensors if name.startswith("policy.")), key=lambda name: tensors[name].numel())
    tensors[name] = tensors[name] * 0.999


def row_edited(run: Path) -> None:
    """A reward in a shard, with name and the buffer's manifest made to fit."""
    path = sorted((run / "replay").glob("run=*/*.parquet"))[0]
    table = pq.read_table(path)
    place = table.schema.get_field_index("reward")
    rewards = [1.0 if value is None else 1.0 - value for value in table["reward"].to_pylist()]
    table = table.set_column(place, table.schema.field(place), pa.array(rewards, pa.float64()))
    path.unlink()
    pq.write_table(table, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    named = path.rename(path.with_name(f"part-00000000-{digest[:8]}.parquet"))
    content = unseal(path.parent / "_manifest.json")
    content["shards"][0] |= {"name": named.name, "sha256": digest, "bytes": named.stat().st_size}
    put(path.parent / "_manifest.json", sealed(content))


def shard_doubled(run: Path) -> None:
    path = sorted((run / "replay").glob("run=*/*.parquet"))[0]
    shutil.copy(path, path.with_name(path.name.replace("part-00000000", "part-00000099")))


def shard_replaced(run: Path) -> None:
    first, *_, last = sorted((run / "replay").glob("run=*/*.parquet"))
    put(first, last.read_bytes())


def ledger_doubled(run: Path) -> None:
    path = sorted((run / "ledger" / "improve").glob("*.parquet"))[-1]
    first, last = (int(part) for part in path.name.split("-")[1:3])
    shutil.copy(path, path.with_name(path.name.replace(f"{first:08d}-{last:08d}", f"{last + 1:08d}-{last + 1:08d}")))


def answers_edited(run: Path) -> None:
    table = pq.read_table(run / "evaluation.parquet")
    place = table.schema.get_field_index("success")
    wrong = pa.array([not value for value in table["success"].to_pylist()])
    (run / "evaluation.parquet").unlink()
    pq.write_table(table.set_column(place, table.schema.field(place), wrong), run / "evaluation.parquet")


def checkpoint_put_back(run: Path) -> None:
    """A whole checkpoint of an unfinished stage, in a run whose stages are done."""
    shutil.copytree(run / "checkpoints" / "clone", run / "checkpoints" / "improve-00000002")


def manifest_edited(run: Path) -> None:
    content = json.loads((run / "manifest.json").read_text())
    content["files"].pop("summary.json")
    put(run / "manifest.json", json.dumps(content, indent=1).encode())


def tokenizer_replaced(run: Path) -> None:
    """The run's base LM in a folder of the test, known before, with two words of its tokenizer exchanged."""
    base = run.parent / "base"
    path = base / "tokenizer.json"
    content = json.loads(path.read_text())
    words = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)[-2:]
    vocabulary = content["model"]["vocab"]
    vocabulary[words[0]], vocabulary[words[1]] = vocabulary[words[1]], vocabulary[words[0]]
    put(path, json.dumps(content).encode())


def base_replaced(run: Path) -> None:
    path = run.parent / "base" / "model.safetensors"
    put(path, flipped(path.read_bytes()))


def in_mlflow(statement: str) -> Damage:
    def change(run: Path) -> None:
        with sqlite3.connect(run.parent / "mlflow.db") as store:
            assert store.execute(statement).rowcount

    return change


def export_replaced(run: Path) -> None:
    path = run / "export" / WEIGHTS
    tensors = load_file(path)
    older(tensors)
    path.unlink()
    save_file(tensors, path)
    resealed(path.parent)


KINDS: dict[str, Damage] = {
    "a bit of the weights": changed(f"checkpoints/improve/{WEIGHTS}", flipped),
    "a bit of an earlier stage's weights": changed(f"checkpoints/actions/{WEIGHTS}", flipped),
    "weights cut": changed(f"checkpoints/clone/{WEIGHTS}", lambda data: data[: len(data) // 2]),
    "two tensors swapped": other_tensors("improve", two_swapped),
    "the codebook of another order": other_tensors("improve", another_codebook),
    "the codebook of the first stage": other_tensors("actions", another_codebook),
    "an older policy": other_tensors("improve", older),
    "improve's result is the clone's": replaced("checkpoints/improve", "checkpoints/clone"),
    "the clone's result is the first stage's": replaced("checkpoints/clone", "checkpoints/actions"),
    "two results exchanged": exchanged("checkpoints/improve", "checkpoints/clone"),
    "a result gone": gone("checkpoints/improve"),
    "an earlier result gone": gone("checkpoints/actions"),
    "a result's manifest gone": gone("checkpoints/clone/manifest.json"),
    "a result's config edited": changed(
        "checkpoints/clone/latent_action_config.json", lambda d: d.replace(b"64", b"63")
    ),
    "a file put into a result": lambda run: put(run / "checkpoints/improve/extra.json", b"{}"),
    "a checkpoint put back": checkpoint_put_back,
    "a metrics line gone": changed("metrics.jsonl", lines(lambda found: [*found[:2], *found[3:]])),
    "the last metrics line gone": changed("metrics.jsonl", lines(lambda found: found[:-1])),
    "a metrics line doubled": changed("metrics.jsonl", lines(lambda found: [*found[:2], found[1], *found[2:]])),
    "metrics lines out of order": changed("metrics.jsonl", lines(lambda found: [found[1], found[0], *found[2:]])),
    "a metrics line put at the end": changed(
        "metrics.jsonl", lambda data: data + line({"stage": "improve", "step": 99, "time": 0.0, "reward": 1.0}).encode()
    ),
    "a metrics line edited": changed("metrics.jsonl", lines(edited)),
    "a metrics line damaged": changed("metrics.jsonl", flipped),
    "metrics gone": gone("metrics.jsonl"),
    "an event gone": changed("events.jsonl", lines(lambda found: found[:-1])),
    "events out of order": changed("events.jsonl", lines(lambda found: found[::-1])),
    "an event doubled": changed("events.jsonl", lines(lambda found: [found[0], *found])),
    "an event edited": changed("events.jsonl", lines(edited)),
    "events gone": gone("events.jsonl"),
    "a start of the ledger edited": changed("ledger/improve/_starts.jsonl", lines(edited)),
    "a start of the ledger doubled": changed("ledger/improve/_starts.jsonl", lines(lambda found: [*found, *found])),
    "the ledger's last part gone": gone("ledger/improve/updates-*.parquet"),
    "a part of the ledger doubled": ledger_doubled,
    "the ledger gone": gone("ledger"),
    "a shard gone": gone("replay/run=*/part-*.parquet"),
    "a shard cut": changed("replay/run=*/part-*.parquet", lambda data: data[:-100]),
    "a shard replaced": shard_replaced,
    "a shard doubled": shard_doubled,
    "a row of a shard edited": row_edited,
    "the buffer gone": gone("replay"),
    "the config edited": changed("config.yaml", lambda data: data.replace(b"seed: 0", b"seed: 1")),
    "the run's manifest edited": manifest_edited,
    "the run's manifest gone": gone("manifest.json"),
    "a number of the summary edited": changed("summary.json", number("evaluation", "improved", "sampled")),
    "seconds of a stage edited": changed("stages/improve.json", number("seconds")),
    "a stage's record gone": gone("stages/clone.json"),
    "a record of a stage that the run has not": lambda run: shutil.copy(
        run / "stages/clone.json", run / "stages/finetune.json"
    ),
    "the config gone": gone("config.yaml"),
    "the config no YAML": lambda run: put(run / "config.yaml", b"seed: [0"),
    "a number of the evaluation edited": changed("evaluation.json", number("base", "greedy")),
    "judged answers edited": answers_edited,
    "judged answers gone": gone("evaluation.parquet"),
    "the environment edited": changed("environment.json", number("cpus")),
    "the report replaced": changed("report.html", lambda data: data.replace(b"0.", b"1.")),
    "the explorer replaced": lambda run: put(run / "explorer.html", (run / "report.html").read_bytes()),
    "the record of MLflow runs edited": changed("mlflow.json", lambda data: data.replace(b'"clone"', b'"clown"')),
    "a number in MLflow differs": in_mlflow("update metrics set value = value + 1 where key = 'reward' and step = 2"),
    "a number in MLflow gone": in_mlflow("delete from metrics where key = 'reward' and step = 2"),
    "a run in MLflow marked deleted": in_mlflow(
        "update runs set lifecycle_stage = 'deleted' where name like '%/improve'"
    ),
    "a parameter in MLflow differs": in_mlflow("update params set value = '0.5' where key like '%.learning_rate'"),
    "the base LM's tokenizer replaced": tokenizer_replaced,
    "the base LM replaced": base_replaced,
    "the export replaced": export_replaced,
    "a file of the export gone": gone("export/tokenizer.json"),
}


# -- the run, once, and its copies -------------------------------------------------------------------------------------


def linked(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to, copy_function=os.link))


@pytest.fixture(scope="module")
def whole(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run with an export, and a base LM beside it that the test owns."""
    from pipeline.serving.export import export, find

    place = tmp_path_factory.mktemp("audited")
    run = Path(shutil.copytree(small_run, place / "first"))
    shutil.copy(small_run.parent / "mlflow.db", place / "mlflow.db")
    export(find(run), run / "export")
    content = unseal(run / "manifest.json")
    (base,) = {Path(name).parent for name in content["files"] if Path(name).is_absolute()}
    shutil.copytree(base, place / "base")
    manifest.know(
        run,
        [str(path) for path in (place / "base").iterdir() if path.is_file()],
        forget=lambda name: name.startswith(str(base)),
    )
    return run


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage; the base is known where the copy has it."""
    (tmp_path / "base").mkdir()
    for path in (whole.parent / "base").iterdir():
        if path.is_file():
            os.link(path, tmp_path / "base" / path.name)
    run = linked(whole, tmp_path / "first")
    shutil.copy(whole.parent / "mlflow.db", tmp_path / "mlflow.db")
    content = unseal(run / "manifest.json")
    moved = {
        name.replace(str(whole.parent / "base"), str(tmp_path / "base")): h for name, h in content["files"].items()
    }
    put(run / "manifest.json", sealed(content | {"files": moved}))
    return run


def failed(run: Path) -> list[str]:
    return [f"{one.question}: {one.answer}" for one in audit(run) if not one.passed]


@pytest.mark.parametrize("kind", KINDS)
def test_each_damaged_or_replaced_part_is_found(copy: Path, kind: str) -> None:
    KINDS[kind](copy)
    assert failed(copy)


WHOLE: dict[str, Damage] = {
    "as it is": lambda run: None,
    "moved": lambda run: None,
    "without its store": lambda run: (run.parent / "mlflow.db").unlink(),
    "without its base": lambda run: shutil.rmtree(run.parent / "base"),
    "its export moved": lambda run: shutil.rmtree(run / "export"),
    "with another report": lambda run: report(run, run / "report.html"),
    "with a desktop's files": lambda run: [put(run / f / ".DS_Store", b"x") for f in ("", "checkpoints", "replay")],
    "killed at its very end": lambda run: put(run / "process.json", b'{"host": "x", "pid": 1, "started": 0.0}'),
    "resumed": lambda run: resume(run),
    "with a leftover of a killed save": lambda run: (run / "checkpoints/.improve.tmp-1").mkdir(),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_nothing_is_found_in_a_whole_run(copy: Path, kind: str) -> None:
    WHOLE[kind](copy)
    run = copy.rename(copy.parent / "second") if kind == "moved" else copy
    if kind == "moved":
        shutil.move(run, run.parent / "elsewhere")
        run = run.parent / "elsewhere"
    assert failed(run) == []


def test_a_run_of_a_version_before_has_no_record_and_is_not_said_to_be_in_order(copy: Path) -> None:
    content = unseal(copy / "manifest.json")
    small = {name: hashes for name, hashes in content["files"].items() if not name.startswith(("/", "check", "export"))}
    put(copy / "manifest.json", sealed({"files": small, "texts": content["texts"]}))
    (answer,) = [one for one in audit(copy) if one.question == "hashes"]
    assert answer.verdict == "no record"
    assert all(name in answer.answer for name in ("checkpoints/improve", "metrics.jsonl", "events.jsonl"))


SMALL = ["actions.updates=6", "clone.updates=4", "improve.updates=6", "improve.checkpoint_every=2"]
SMALL += ["improve.prompts_per_update=4", "improve.group_size=4", "evaluation=null", "explorer.enabled=false"]
OTHERS = {
    "async": ["improve.mode=async", "improve.max_staleness=1"],
    "token level, FTA-P": ["improve.token_baseline=true", "finetune.updates=2"],
    "offline stages only": ["improve=null"],
    "untracked, not stored": ["tracking.enabled=false", "replay.enabled=false"],
    "the best policy kept": ["improve.evaluate_every=2", "improve.keep_best=true"],
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", OTHERS)
def test_nothing_is_found_in_runs_of_other_configurations(tmp_path: Path, kind: str) -> None:
    call("run", QUICKSTART, *SMALL, *OTHERS[kind], "--run-dir", str(tmp_path / "run"))
    assert failed(tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_run_is_whole_and_stays_so_when_resumed(tmp_path: Path, number: int, mode: str) -> None:
    run, arguments = tmp_path / "run", [*SMALL, "improve.updates=40", f"improve.mode={mode}"]
    with subprocess.Popen(command("run", QUICKSTART, *arguments, "--run-dir", str(run))) as process:
        deadline = time.monotonic() + 600
        while not list(run.glob("checkpoints/improve-*/manifest.json")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        process.wait(60)
    assert failed(run) == []
    newest = max(run.glob("checkpoints/improve-*"))
    newest.rename(run / "aside")
    assert failed(run), "a checkpoint of an interrupted run is gone"
    (run / "aside").rename(newest)
    assert failed(run) == []
    call("resume", str(run))
    assert failed(run) == []
