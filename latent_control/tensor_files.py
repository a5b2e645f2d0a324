"""Tensors of safetensors files, by name."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from latent_control.bases.weight_files import Shape


def as_readable_as(plain: Path) -> None:
    """Give the weights beside ``plain`` its permissions, those of any new file: safetensors makes its own private."""
    for pattern in ("*.safetensors", "base/*.safetensors"):
        for path in plain.parent.glob(pattern):
            path.chmod(plain.stat().st_mode & 0o777)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path}: {error}; take another checkpoint") from error


def require_tensors(folder: Path, wanted: dict[str, Shape], found: dict[str, Shape], prefix: str = "") -> None:
    """``ValueError`` unless ``found`` are the names and shapes of ``wanted``; tensors without ``prefix`` may be there
    too."""
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is unknown" for name in found.keys() - wanted.keys() if name.startswith(prefix)]
    problems += [f"{n} is {found[n]}, not {wanted[n]}" for n in wanted.keys() & found.keys() if found[n] != wanted[n]]
    if problems:
        raise ValueError(f"{folder} does not fit its own config: " + "; ".join(sorted(problems)[:8]))
