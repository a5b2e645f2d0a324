"""Files that claim to be huge: YAML aliases, nested JSON, runs of a Parquet dictionary, headers. Each is refused by a
sentence, in bounded time and memory."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from replay_rows import fill

from configs.loading import ConfigErrors, load_config
from configs.yaml_text import YamlProblem, read
from latent_control.bases.weight_files import read_shapes
from latent_control.pretrained import read_config
from pipeline.replay.shards import open_all
from pipeline.runs.summary import read_summary
from pipeline.storage.atomic import sha256_file
from pipeline.storage.checkpoints import load_tree, verify
from pipeline.tracking.uris import read_record

ROOT = Path(__file__).resolve().parents[2]
DEEP = "[" * 100_000
ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ALIASES, "aliases"),
        ("a: &a {" + ", ".join(f"k{i}: *a" for i in range(3)) + "}", "recursion"),
        ("a: " + "{b: " * 2000 + "1" + "}" * 2000, "recursion"),
        ("a: " + "9" * 5000, "digits"),
    ],
)
def test_a_config_of_a_few_lines_stays_small(tmp_path: Path, text: str, words: str) -> None:
    begun = time.monotonic()
    with pytest.raises(YamlProblem, match=words):
        read(text)
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigErrors, match=words):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(ConfigErrors, match=words):
        load_config(ROOT / "configs" / "quickstart.yaml", [f"task.options={text}"])
    assert time.monotonic() - begun < 10


def test_weights_given_as_a_config_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(50 << 30)  # a file of holes
    with pytest.raises(ConfigErrors, match="give the YAML file"):
        load_config(tmp_path / "model.safetensors")


def test_nested_json_is_damage_like_any_other(tmp_path: Path) -> None:
    for name in ("config.json", "manifest.json", "summary.json", "mlflow.json", "t.json"):
        (tmp_path / name).write_text(DEEP)
    (tmp_path / "latent_action.json").write_text(DEEP)
    assert read_summary(tmp_path) == {} and read_record(tmp_path) is None
    assert "not JSON" in verify(tmp_path)[0]
    for reader in (lambda: load_tree(tmp_path, "t"), lambda: read_config(tmp_path)):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
            reader()
    (tmp_path / "config.yaml").write_text("base: {model: x}\n")
    command = [sys.executable, "-m", "pipeline", "show", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_a_header_of_100_mb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((100_000_000).to_bytes(8, "little") + b"{" + b" " * 1000)
    with pytest.raises(ValueError, match="its header should have 100000000 bytes, but the file has 1009"):
        read_shapes(path)
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_shapes(path)
    tensor = {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}
    header = json.dumps({"a": tensor}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_shapes(path)


def test_a_shard_of_a_few_kilobytes_stays_small(tmp_path: Path) -> None:
    """The same text again and again costs a dictionary's file nothing, and its reader 20 GB."""
    fill(tmp_path / "replay", 16)
    (path,) = (tmp_path / "replay").rglob("part-*.parquet")
    table, rows = pq.read_table(path).slice(0, 1), 20_000
    name = next(field.name for field in table.schema if pa.types.is_string(field.type))
    index = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * 1_000_000]))
    same = table.take(pa.array([0] * rows))
    bomb = path.with_name("bomb")
    pq.write_table(same.set_column(table.schema.get_field_index(name), name, index), bomb, row_group_size=rows)
    assert bomb.stat().st_size < 3 << 20
    bomb.rename(path.with_name(f"part-00000000-{sha256_file(bomb)[:8]}.parquet"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shards, quarantined = open_all(tmp_path / "replay")
    assert [shard.path for shard in shards] == [path]
    assert f"has 20000 values in {name}" in quarantined[0].reason
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
