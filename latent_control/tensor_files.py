"""Tensors of safetensors files, by name."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from latent_control.bases.weight_files import Shape


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
