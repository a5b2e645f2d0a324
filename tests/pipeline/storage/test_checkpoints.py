"""Checkpoints: bit-exact trees, and every kind of damage found and skipped by name."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.storage import checkpoints
from pipeline.storage.atomic import sealed, unseal, write_atomic


def write_one(root: Path, update: int, text: str = "weights") -> Path:
    folder = root / f"clone-{update:08d}"

    def files(staging: Path) -> None:
        (staging / "model").mkdir()
        (staging / "model" / "a.txt").write_text(text * 50)
        checkpoints.save_tree(staging, "state", {"step": update, "w": torch.arange(6.0)})

    checkpoints.write(folder, files=files, info={"update": update, "loss": 0.25})
    return folder


def assert_same(left: object, right: object) -> None:
    """Equal to the bit: types, dtypes, shapes, NaNs and the sign of zero included."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        assert left.contiguous().reshape(-1).view(torch.uint8).equal(right.contiguous().reshape(-1).view(torch.uint8))
    elif isinstance(left, np.ndarray | np.generic):
        assert left.dtype.str == right.dtype.str
        assert left.shape == right.shape
        assert left.tobytes() == right.tobytes()
    elif isinstance(left, dict):
        assert [(type(k), k) for k in left] == [(type(k), k) for k in right]
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif isinstance(left, float):
        assert math.copysign(1, left) == math.copysign(1, right)
        assert left == right or (math.isnan(left) and math.isnan(right))
    else:
        assert left == right


def round_trip(folder: Path, tree: object) -> object:
    checkpoints.save_tree(folder, "tree", tree)
    return checkpoints.load_tree(folder, "tree")


def test_adamw_state_comes_back_bit_for_bit_and_steps_on_equally(tmp_path: Path) -> None:
    torch.manual_seed(0)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for i in range(steps):
            optimizer.zero_grad()
            model(torch.full((2, 3), float(i + 1))).square().mean().backward()
            optimizer.step()

    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(torch.float32)
        decay = {"params": list(model[0].parameters()), "weight_decay": 0.1}
        return model, torch.optim.AdamW([decay, {"params": list(model[1].parameters())}], lr=1e-2, betas=(0.8, 0.95))

    model, optimizer = make()
    train(model, optimizer, 3)
    saved = optimizer.state_dict()
    loaded = round_trip(tmp_path, saved)
    assert_same(saved, loaded)
    assert all(type(key) is int for key in loaded["state"])
    other, other_optimizer = make()
    other.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(loaded)
    train(model, optimizer, 2)
    train(other, other_optimizer, 2)
    assert_same(dict(model.state_dict()), dict(other.state_dict()))


def test_trees_of_every_kind(tmp_path: Path) -> None:
    shared = torch.arange(12, dtype=torch.int16).reshape(3, 4)
    tree = {
        "a/b": {"c": torch.tensor(1.5, dtype=torch.bfloat16)},
        "a": {"b/c": torch.tensor([math.nan, -0.0, math.inf])},
        0: "int key",
        "0": "str key",
        None: True,
        -3: [],
        "empty": {},
        "nothing": torch.zeros(0, 5),
        "views": [shared, shared[1], shared.T, shared],
        "tuple": (1, 2.5, None, "ü\n", False, 2**70, math.inf, -0.0, math.nan),
        "numpy": [
            np.array(3, dtype=">i4"),
            np.float64(0.1),
            np.arange(6, dtype=np.float16).reshape(2, 3).T,
            np.array(["x", "yz"]),
            np.zeros((0, 2)),
        ],
        "rng": [torch.get_rng_state(), np.random.default_rng(3).bit_generator.state],
    }
    assert_same(tree, round_trip(tmp_path, tree))
    assert_same({}, round_trip(tmp_path, {}))
    assert_same(7, round_trip(tmp_path, 7))


@pytest.mark.parametrize("dtype", sorted(checkpoints._SAFETENSORS_DTYPES, key=str), ids=str)
def test_every_dtype_is_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.randint(
        0, 2 if dtype is torch.bool else 256, (64,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    tensor = raw.view(dtype)
    assert_same({"x": tensor, "scalar": tensor[0]}, round_trip(tmp_path, {"x": tensor, "scalar": tensor[0]}))


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"a": [{1, 2}]}, r"tree\['a'\]\[0\].*set"),
        ({(1, 2): 3}, r"key \(1, 2\)"),
        ({"x": np.array([object()])}, "numpy array of object"),
        ({"x": torch.zeros(2, dtype=torch.complex128)}, "complex128"),
        ({"x": torch.zeros(2).to_sparse()}, "sparse"),
        ({"x": torch.float32}, "torch.float32"),
    ],
)
def test_what_a_tree_cannot_hold_is_named(tmp_path: Path, tree: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        checkpoints.save_tree(tmp_path, "tree", tree)


def test_damaged_trees_are_value_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the tree 'tree'"):
        checkpoints.load_tree(tmp_path, "tree")
    checkpoints.save_tree(tmp_path, "tree", {"w": torch.ones(3)})
    tensors = tmp_path / "tree.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="cannot read the tree 'tree'"):
        checkpoints.load_tree(tmp_path, "tree")
    tensors.write_bytes(whole)
    for text in (
        "[]",
        "{}",
        '{"format": 2, "tree": 1}',
        '{"format": 1, "tree": {"what": 1}}',
        '{"format": 1, "tree": {"tensor": "9"}}',
        "{",
    ):
        (tmp_path / "tree.json").write_text(text)
        with pytest.raises(ValueError, match="cannot read the tree 'tree'"):
            checkpoints.load_tree(tmp_path, "tree")


def test_write_verify_and_info(tmp_path: Path) -> None:
    folder = write_one(tmp_path, 100)
    assert checkpoints.verify(folder) == []
    assert checkpoints.read_info(folder) == {"update": 100, "loss": 0.25}
    assert {path.name for path in tmp_path.iterdir()} == {"clone-00000100"}
    listed = unseal(folder / "manifest.json")
    assert sorted(listed["files"]) == ["model/a.txt", "state.json", "state.safetensors"]
    assert (
        listed["versions"]["torch"] == torch.__version__.split("+")[0]
        or listed["versions"]["torch"] == torch.__version__
    )
    write_one(tmp_path, 100, "other ")
    assert (folder / "model" / "a.txt").read_text().startswith("other")
    assert checkpoints.verify(folder) == []
    assert {path.name for path in tmp_path.iterdir()} == {"clone-00000100"}


def test_a_failing_writer_leaves_what_was_there(tmp_path: Path) -> None:
    folder = write_one(tmp_path, 100)

    def fails(staging: Path) -> None:
        (staging / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoints.write(folder, files=fails, info={})
    assert checkpoints.verify(folder) == []
    assert {path.name for path in tmp_path.iterdir()} == {"clone-00000100"}
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        checkpoints.write(folder, files=lambda staging: None, info={"x": {1}})
    assert checkpoints.verify(folder) == []


def test_leftovers_of_a_killed_writer_are_ignored_and_removed(tmp_path: Path) -> None:
    write_one(tmp_path, 100)
    killed = tmp_path / ".clone-00000200.tmp-999999"
    killed.mkdir()
    (killed / "half").write_text("x")
    assert checkpoints.newest_valid(tmp_path, "clone") == (tmp_path / "clone-00000100", [])
    write_one(tmp_path, 200)
    assert not killed.exists()


def flip_bit(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (lambda f: flip_bit(f / "state.safetensors", 1.0), "state.safetensors has SHA-256"),
    "flipped bit in the manifest": (lambda f: flip_bit(f / "manifest.json", 0.3), "manifest.json"),
    "truncated": (lambda f: os.truncate(f / "model" / "a.txt", 7), "model/a.txt has 7 bytes, written were 350"),
    "missing file": (lambda f: (f / "state.json").unlink(), "state.json is missing"),
    "folder in place of a file": (
        lambda f: ((f / "state.json").unlink(), (f / "state.json").mkdir()),
        "state.json is missing",
    ),
    "foreign file": (lambda f: (f / "model" / "b.txt").write_text("?"), "model/b.txt is not in manifest.json"),
    "missing manifest": (lambda f: (f / "manifest.json").unlink(), "no manifest.json: it was never finished"),
    "empty manifest": (lambda f: (f / "manifest.json").write_bytes(b""), "manifest.json is not JSON"),
    "manifest of lists": (lambda f: (f / "manifest.json").write_text("[]"), "is not a JSON object"),
    "later format": (lambda f: write_atomic(f / "manifest.json", sealed({"format": 9})), "has format 9"),
    "empty folder": (lambda f: (shutil.rmtree(f), f.mkdir()), "no manifest.json: it was never finished"),
    "a file in its place": (lambda f: (shutil.rmtree(f), f.write_text("x")), "is not a folder"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_the_state_before_is_used(tmp_path: Path, kind: str) -> None:
    for update in (100, 200, 300):
        write_one(tmp_path, update)
    damage, words = DAMAGE[kind]
    damage(tmp_path / "clone-00000300")
    found, skipped = checkpoints.newest_valid(tmp_path, "clone")
    assert found == tmp_path / "clone-00000200"
    assert len(skipped) == 1
    assert skipped[0].startswith("clone-00000300: ")
    assert words in skipped[0]


def test_no_flipped_bit_of_a_manifest_is_missed(tmp_path: Path) -> None:
    manifest = write_one(tmp_path, 1) / "manifest.json"
    whole = manifest.read_bytes()
    for position in range(len(whole)):
        bad = bytearray(whole)
        bad[position] ^= 1 << (position % 8)
        manifest.write_bytes(bad)
        assert checkpoints.verify(manifest.parent) != [], position


def test_newest_valid_without_any(tmp_path: Path) -> None:
    assert checkpoints.newest_valid(tmp_path / "nowhere", "clone") == (None, [])
    flip_bit(write_one(tmp_path, 1) / "state.json")
    found, skipped = checkpoints.newest_valid(tmp_path, "clone")
    assert found is None
    assert len(skipped) == 1
    assert checkpoints.newest_valid(tmp_path, "improve") == (None, [])


def test_newest_is_the_highest_number_not_the_first_in_the_alphabet(tmp_path: Path) -> None:
    for update in (99_999_999, 100_000_000):
        write_one(tmp_path, update)
    assert checkpoints.newest_valid(tmp_path, "clone")[0] == tmp_path / "clone-100000000"


def test_the_newest_whole_ones_are_kept(tmp_path: Path) -> None:
    for update in range(100, 700, 100):
        write_one(tmp_path, update)
    (tmp_path / "clone-00000600" / "state.json").unlink()
    doomed = checkpoints.surplus(tmp_path, "clone", 2)
    assert sorted(path.name for path in doomed) == ["clone-00000100", "clone-00000200", "clone-00000300"]
    checkpoints.delete(doomed)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "clone-00000400",
        "clone-00000500",
        "clone-00000600",
    ]
    assert json.loads((tmp_path / "clone-00000400" / "manifest.json").read_text())["info"]["update"] == 400
    checkpoints.delete(checkpoints.surplus(tmp_path, "clone", 0))
    assert list(tmp_path.iterdir()) == []


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    """As any program's files: on shared storage a run is read by more than one user."""
    (tmp_path / "plain").touch()
    write_atomic(tmp_path / "atomic", b"x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode
