"""Safetensors files of a model's folder, looked at without reading a weight: which files, whole or not, which tensors
of which shape."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from re import findall, sub

from safetensors import SafetensorError, safe_open

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Shape = tuple[int, ...]

_POINTER = b"version https://git-lfs"
_LENGTH = 8
"""Bytes in front of a safetensors header that say how long it is."""
_AGAIN = "copy it again"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_HEADER = 100_000_000
"""Bytes that safetensors allows a header."""
_LONGEST = 120
_MOST = 1_000_000
"""Numbered names beyond which nobody looks for gaps: no model has that many."""


class Incomplete(ValueError):
    """Files with weights are not there."""


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The tensors of a model's folder: ``WeightFiles(listed="model.safetensors", shapes={"lm_head.weight": (48, 32)},
    files={...})``."""

    listed: str
    """The file, or the index, that says where the tensors are."""
    shapes: dict[str, Shape]
    """By name, as the files call them."""
    files: dict[str, str]
    """Name of the file that holds each tensor."""
    dtype: str | None = None
    """Number type of the first tensor, as torch calls it; ``None`` for one that is not of 16 or 32 bits."""


def read_shapes(path: Path) -> dict[str, Shape]:
    """Names and shapes of a safetensors file, from its header; its length must be the one the header speaks of.

    Raises:
        ValueError: it is missing, a Git LFS pointer, cut, or no safetensors file; the message names file and remedy.
    """
    if problem := file_problem(path):
        raise ValueError(problem)
    try:
        with safe_open(path, framework="np") as tensors:  # maps the file: nothing but the header is read
            names = list(tensors.keys())
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({_why(path) or error}); {_AGAIN}") from error


def file_problem(path: Path) -> str | None:
    """Why nothing can be read at ``path``, with the remedy; ``None`` for a file with content."""
    if not path.is_file():
        there = "is not a file" if path.exists() else "is a link to nothing" if path.is_symlink() else "is not there"
        return f"{path} {there}; copy the whole folder again"
    try:
        with path.open("rb") as file:
            begin = file.read(len(_POINTER))
    except OSError as error:
        return f"{path} cannot be read ({error.strerror}); change its permissions, or {_AGAIN}"
    if begin == _POINTER:
        return f"{path} is a Git LFS pointer, not the file itself; run git lfs pull in its folder, or download it again"
    return None if begin else f"{path} is empty; {_AGAIN}"


def _why(path: Path) -> str | None:
    """What is wrong with the lengths of a safetensors file, in bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = int.from_bytes(file.read(_LENGTH), "little")
        if size < _LENGTH or header > min(size - _LENGTH, _HEADER):
            return f"its header should have {header} bytes, but the file has {size}"
        try:
            entries = json.loads(file.read(header))
            end = max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
            wanted = _LENGTH + header + end
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return None
    return f"it should have {wanted} bytes, but has {size}" if wanted != size else None


def _dtype(path: Path) -> str | None:
    with safe_open(path, framework="np") as tensors:
        first = next(iter(tensors.keys()), None)
        return None if first is None else _DTYPES.get(tensors.get_slice(first).get_dtype())


def read_folder(folder: Path) -> WeightFiles:
    """The tensors of ``folder`` in the files that ``from_pretrained`` would take: one file, or shards with an index.

    Raises:
        Incomplete: there are none, or some are missing.
        ValueError: one is not whole.
    """
    if (single := folder / SINGLE).is_file():
        shapes = read_shapes(single)
        return WeightFiles(listed=SINGLE, shapes=shapes, files=dict.fromkeys(shapes, SINGLE), dtype=_dtype(single))
    if not (folder / INDEX).is_file():
        raise Incomplete(_no_weights(folder))
    found = _read_shards(folder)
    return WeightFiles(
        listed=INDEX,
        shapes={tensor: shape for shapes in found.values() for tensor, shape in shapes.items()},
        files={tensor: name for name, shapes in found.items() for tensor in shapes},
        dtype=_dtype(folder / next(iter(found))),
    )


def _read_shards(folder: Path) -> dict[str, dict[str, Shape]]:
    """File -> its tensors, for all that the index names."""
    names = sorted(set(_read_index(folder / INDEX).values()))
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise Incomplete(
            f"{folder} lacks {len(absent)} of the {len(names)} files that its {INDEX} names: {first_names(absent)}; "
            "copy the whole folder again"
        )
    return {name: read_shapes(folder / name) for name in names}


def _read_index(path: Path) -> dict[str, str]:
    """File of each tensor; the files lie in the same folder."""
    if problem := file_problem(path):
        raise ValueError(problem)
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        good = isinstance(places, dict) and bool(places) and all(isinstance(name, str) for name in places.values())
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not an index of safetensors files ({type(error).__name__}); {_AGAIN}") from error
    if not good:
        raise ValueError(f"{path} is not an index of safetensors files (weight_map names no files); {_AGAIN}")
    if outside := [name for name in places.values() if Path(name).name != name or not name.endswith(".safetensors")]:
        raise ValueError(
            f"{path} names {first_names(outside)}, which is not a safetensors file in the same folder; {_AGAIN}"
        )
    return places


def _no_weights(folder: Path) -> str:
    """Why a folder has no weights that are read, by what it has instead."""
    names = sorted(path.name for path in folder.iterdir())
    dangling = [name for name in (SINGLE, INDEX) if name in names]
    variants = [name for name in names if name.endswith((".safetensors", ".safetensors.index.json"))]
    pickles = [name for name in names if name.endswith((".bin", ".bin.index.json", ".pt", ".pth", ".ckpt"))]
    if dangling:
        return file_problem(folder / dangling[0]) or f"{folder / dangling[0]} cannot be read"
    if "adapter_config.json" in names:
        return (
            f"{folder} has the config of a whole model, but the weights of an adapter only; remove config.json: it "
            "is the base's"
        )
    if variants:
        return (
            f"{folder} has no {SINGLE} and no {INDEX}, but {first_names(variants)}; if that is the model, give it "
            "the usual name"
        )
    if pickles:
        return (
            f"{folder} has its weights in {first_names(pickles)} only, which are pickles and not read; take the "
            "model's safetensors, "
            "or convert it where you trust it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    return f"{folder} has no weights: neither {SINGLE} nor {INDEX} is there; copy the whole folder again"


def absent_by_number(names: Iterable[str]) -> list[str]:
    """Names left out of numbered rows of names, e.g. ``["x.1.w"]`` for ``x.0.w`` and ``x.2.w``."""
    rows: dict[str, list[tuple[int, ...]]] = {}
    for name in names:
        rows.setdefault(sub(r"\d+", "\0", name), []).append(tuple(int(number) for number in findall(r"\d+", name)))
    return sorted(name for pattern, found in rows.items() for name in _absent(pattern, found))


def _absent(pattern: str, found: list[tuple[int, ...]]) -> Iterator[str]:
    seen, columns = set(found), [sorted(set(column)) for column in zip(*found, strict=True)]
    if prod(map(len, columns)) > _MOST:
        return
    for numbers in product(*columns):
        if numbers not in seen:
            pieces = pattern.split("\0")
            yield "".join(f"{piece}{number}" for piece, number in zip(pieces, [*numbers, ""], strict=True))


def first_names(names: Iterable[str], count: int = 3) -> str:
    """The first few of ``names``, and how many more."""
    # Names come from the files: what would steer a terminal is shown escaped.
    listed = [name if name.isprintable() else ascii(name) for name in dict.fromkeys(names)]
    more = f" and {len(listed) - count} more" if len(listed) > count else ""
    return ", ".join(name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..." for name in listed[:count]) + more
