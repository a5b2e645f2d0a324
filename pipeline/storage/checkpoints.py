"""Checkpoints: folders that are complete and hashed, or absent.

``write`` stages in a hidden folder beside the target, hashes every file into ``manifest.json``, syncs and renames, so a
kill at any moment leaves the earlier checkpoints as they were. Readers trust only what ``verify`` accepts.
Trees of tensors (optimiser states) are safetensors plus JSON: nothing here can run code when it is read.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.storage.atomic import UMASK, fsync_file, fsync_folder, sealed, sha256_file, unseal

MANIFEST = "manifest.json"
FORMAT = 1
_PACKAGES = ("torch", "transformers", "ray", "safetensors", "numpy")
_NAMES = """bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 bfloat16 float32 float64 complex64
float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"""
_SAFETENSORS_DTYPES = frozenset(getattr(torch, name) for name in _NAMES.split())


def write(folder: Path, *, files: Callable[[Path], None], info: Mapping[str, Any]) -> None:
    """Make the checkpoint ``folder`` (named ``<prefix>-<update:08d>``) from what ``files(staging)`` writes.

    ``info`` is JSON data kept in the manifest (``read_info`` gives it back). A folder that was there is replaced.
    An exception of ``files`` is passed on, and the staging folder is removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f".{folder.name}.*-*"):
        shutil.rmtree(leftover)  # of an attempt that was killed
    staging = folder.parent / f".{folder.name}.tmp-{os.getpid()}"
    staging.mkdir()
    try:
        files(staging)
        _seal(staging, info)
        _publish(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # gone already when it was published


def _seal(staging: Path, info: Mapping[str, Any]) -> None:
    """Hash and sync all files, then write the manifest."""
    listed = {}
    for path in _files(staging):
        if path.is_symlink() or path.name == MANIFEST:
            raise ValueError(
                f"{path.relative_to(staging)} cannot be part of a checkpoint: write plain files, none named {MANIFEST}"
            )
        path.chmod(0o666 & ~UMASK)  # safetensors makes its files private; others may read runs on shared storage
        fsync_file(path)
        listed[path.relative_to(staging).as_posix()] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    content = {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(),
        "versions": _versions(),
        "info": dict(info),
        "files": listed,
    }
    (staging / MANIFEST).write_bytes(sealed(content))
    fsync_file(staging / MANIFEST)
    for inner in [staging, *(path for path in staging.rglob("*") if path.is_dir())]:
        fsync_folder(inner)


def _publish(staging: Path, folder: Path) -> None:
    if folder.exists():
        # A folder cannot be replaced in one step; should we die in between, resume falls back to the checkpoint before.
        old = folder.parent / f".{folder.name}.old-{os.getpid()}"
        folder.rename(old)
        staging.rename(folder)
        shutil.rmtree(old)
    else:
        staging.rename(folder)
    fsync_folder(folder.parent)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _files(folder: Path) -> list[Path]:
    """All files in ``folder``, except hidden ones, which desktops and network disks leave behind."""
    return sorted(p for p in folder.rglob("*") if (p.is_symlink() or not p.is_dir()) and not p.name.startswith("."))


def verify(folder: Path, *, hashes: bool = True) -> list[str]:
    """The problems of a checkpoint, one line each; empty when it is exactly what was written.

    Without ``hashes`` only names and sizes are compared, which reads no tensor.
    """
    if not folder.is_dir():
        return [f"{folder} is not a folder"]
    try:
        content = unseal(folder / MANIFEST)
    except FileNotFoundError:
        return [f"no {MANIFEST}: it was never finished"]
    except (OSError, ValueError) as error:
        return [str(error)]
    if content.get("format") != FORMAT:
        return [f"{MANIFEST} has format {content.get('format')!r}, this version reads {FORMAT}"]
    there = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    there.pop(MANIFEST, None)
    problems = [f"{name} is not in {MANIFEST}" for name in sorted(there.keys() - content["files"].keys())]
    for name, entry in content["files"].items():
        problem = _file_problem(there.get(name), entry, hashes)
        problems += [f"{name} {problem}"] if problem else []
    return problems


def _file_problem(path: Path | None, entry: Mapping[str, Any], hashes: bool) -> str | None:
    if path is None or not path.is_file():
        return "is missing"
    try:
        if (size := path.stat().st_size) != entry["bytes"]:
            return f"has {size} bytes, written were {entry['bytes']}"
        if hashes and (found := sha256_file(path)) != entry["sha256"]:
            return f"has SHA-256 {found[:12]}, written was {entry['sha256'][:12]}"
    except OSError as error:
        return f"is not readable ({error.strerror})"
    return None


def read_info(folder: Path) -> dict[str, Any]:
    """The ``info`` a checkpoint was written with; ``ValueError`` when its manifest is missing or damaged."""
    try:
        return dict(unseal(folder / MANIFEST)["info"])
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no {MANIFEST}: it is not a checkpoint, or was never finished") from error


def checkpoints(root: Path, prefix: str) -> list[Path]:
    """The folders ``<prefix>-<update>`` in ``root``, newest (highest update) first; valid or not."""
    pattern = re.compile(rf"{re.escape(prefix)}-([0-9]{{8,}})")
    there = root.iterdir() if root.is_dir() else ()
    named = [(int(match[1]), path) for path in there if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted(named, reverse=True)]


def newest_valid(root: Path, prefix: str) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint, and a line on each newer one that was skipped.

    ``(root / "improve-00000100", ["improve-00000150: policy.safetensors is missing"])``
    """
    skipped: list[str] = []
    for folder in checkpoints(root, prefix):
        problems = verify(folder)
        if not problems:
            return folder, skipped
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        skipped.append(f"{folder.name}: {problems[0]}{more}")
    return None, skipped


def surplus(root: Path, prefix: str, keep: int) -> list[Path]:
    """All but the ``keep`` newest whole checkpoints.

    A damaged folder never counts as one of the ``keep``, so the last good state survives (0: none is needed any more).
    Hashes are not read here.
    """
    kept = 0
    found: list[Path] = []
    for folder in checkpoints(root, prefix):
        if kept < keep:
            kept += not verify(folder, hashes=False)
        else:
            found.append(folder)
    return found


def delete(folders: Iterable[Path]) -> None:
    """Delete checkpoints. Renamed first: no reader ever sees one that is half deleted."""
    for folder in folders:
        shutil.rmtree(folder.rename(folder.parent / f".{folder.name}.old-{os.getpid()}"))


def save_tree(folder: Path, name: str, tree: Any) -> None:
    """Write a tree as ``<name>.safetensors`` and ``<name>.json`` in ``folder``.

    A tree is any nesting of dicts (keys: str, int, float, bool, None), lists and tuples with tensors, numpy arrays or
    scalars, str, int, float, bool and None at its ends. ``ValueError`` names the place of anything else.
    """
    tensors: dict[str, torch.Tensor] = {}
    structure = _encode(tree, name, tensors)
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps({"format": FORMAT, "tree": structure}))


def load_tree(folder: Path, name: str) -> Any:
    """The tree ``save_tree`` wrote, bit for bit: types, key types and dtypes included; tensors are on the CPU.

    Raises:
        ValueError: a file is missing or was not written by ``save_tree``.
    """
    try:
        saved = json.loads((folder / f"{name}.json").read_text())
        if saved["format"] != FORMAT:
            raise ValueError(f"format {saved['format']!r}, this version reads {FORMAT}")
        return _decode(saved["tree"], load_file(folder / f"{name}.safetensors"))
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot read the tree {name!r} in {folder}: {error}") from error


def _encode(node: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON of a node. Ends are themselves; every container and tensor is an object with one telling key."""
    if isinstance(node, torch.Tensor):
        return {"tensor": _store(node, place, tensors)}
    if isinstance(node, np.ndarray | np.generic):
        return _encode_numpy(node, place, tensors)
    if node is None or type(node) in (bool, int, float, str):
        return node
    if isinstance(node, dict):
        for key in node:
            if key is not None and type(key) not in (bool, int, float, str):
                raise ValueError(
                    f"{place} has the key {key!r} ({type(key).__name__}); keys are str, int, float, bool or None"
                )
        return {"dict": [[key, _encode(value, f"{place}[{key!r}]", tensors)] for key, value in node.items()]}
    if isinstance(node, list | tuple):
        kind = "list" if isinstance(node, list) else "tuple"
        return {kind: [_encode(value, f"{place}[{i}]", tensors) for i, value in enumerate(node)]}
    raise ValueError(
        f"{place} is {node!r:.80} ({type(node).__name__}); a tree holds dicts, lists, tuples, tensors, numpy arrays, "
        "str, numbers and None"
    )


def _store(tensor: torch.Tensor, place: str, tensors: dict[str, torch.Tensor]) -> str:
    """Keep a tensor under the next number (names would need escaping and could collide)."""
    if tensor.dtype not in _SAFETENSORS_DTYPES or tensor.layout != torch.strided:
        raise ValueError(
            f"{place} is a {tensor.layout} tensor of {tensor.dtype}, which safetensors cannot hold; "
            "convert it before saving"
        )
    name = str(len(tensors))
    # A separate copy: safetensors refuses two names for one storage, and a view would drag its whole storage along.
    tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return name


def _encode_numpy(node: np.ndarray | np.generic, place: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    array = np.asarray(node)
    if array.dtype.hasobject or array.dtype.fields is not None or array.dtype.str.startswith("|V"):
        raise ValueError(
            f"{place} is a numpy array of {array.dtype}; a tree holds arrays of plain numbers, strings and dates"
        )
    raw = np.frombuffer(array.tobytes(), np.uint8)  # bytes: numpy has types and byte orders that torch has not
    stored = _store(torch.from_numpy(raw.copy()), place, tensors)
    return {
        "numpy": stored,
        "dtype": array.dtype.str,
        "shape": list(array.shape),
        "scalar": isinstance(node, np.generic),
    }


def _decode(node: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    if "tensor" in node:
        return tensors[node["tensor"]]
    if "numpy" in node:
        array = np.frombuffer(tensors[node["numpy"]].numpy().tobytes(), np.dtype(node["dtype"])).reshape(node["shape"])
        return array[()] if node["scalar"] else array.copy()
    if "dict" in node:
        return {key: _decode(value, tensors) for key, value in node["dict"]}
    if "list" in node:
        return [_decode(value, tensors) for value in node["list"]]
    return tuple(_decode(value, tensors) for value in node["tuple"])
