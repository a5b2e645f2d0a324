"""The number type that is fast here: what ``auto`` in ``base.dtype`` and ``mixed_precision`` stands for.

A run's driver decides once, before anything is loaded, and writes concrete types into the run's config.yaml: workers,
``resume``, exports and evaluations read them there. A table of capabilities answers for most machines; where it cannot
(AVX-512 without bfloat16, ARM, limits by environment variables), half a second of matrix products does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import NamedTuple

import psutil

from configs.checks import offline_sections
from configs.schema import Base, Improve, RunConfig, Training
from pipeline.runs.stage_table import IMPROVE

AUTO, FULL = "auto", "float32"
NATIVE = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
"""Flags, as ``torch.cpu.get_capabilities`` has them, of processors that multiply bfloat16 in hardware."""
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
"""Variables that keep oneDNN and torch from instructions that the processor has."""
BELOW = {"SSE41", "AVX", "AVX2", "AVX2_VNNI"}
"""oneDNN's limits under which bfloat16 is converted to float32 and back; ATen's own leave matrix products to oneDNN."""
SECONDS, WIDTH, WIDEST = 0.5, 576, 1024
"""Length of the measurement; the width where the base LM's is not known, and the largest that is tried."""
MEMORY = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


class TypeVerdict(NamedTuple):
    """Whether bfloat16 is fast somewhere, and how that is known: ``TypeVerdict(False, "this processor has ...")``."""

    fast: bool
    why: str


class _Stored(NamedTuple):
    """The base LM as its files say: number type (``auto``: for the loader to say), width, number of parameters (0: not
    known)."""

    dtype: str
    width: int
    parameters: int


def decided(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """``config`` with a concrete type in the place of each ``auto``, and the reasons, one line each.

    The weights of the base LM are never rounded: what is stored in float32 stays so, what is stored in 16 bits is
    computed in these where that is fast and in float32 where it is not and memory allows.

    Raises:
        ValueError: the base LM's config cannot be read.
    """
    changes: dict[str, object] = {}
    sections = [name for name, section in _precise(config) if section.mixed_precision == AUTO]
    stored = _stored(config) if sections or config.base.dtype == AUTO else None
    if stored is None:
        return config, []
    reasons = []
    if config.base.dtype == AUTO:
        dtype, why = _base_type(config, stored)
        changes["base"] = config.base.model_copy(update={"dtype": dtype})
        reasons.append(f"base.dtype: {dtype} ({why})")
    by_device: dict[str, list[str]] = {}
    for name in sections:
        by_device.setdefault(_device(config, name), []).append(name)
    for device, names in by_device.items():
        fast, why = bfloat16_on(device, stored.width)
        value = "bf16" if fast else "no"
        reasons.append(f"mixed_precision: {value} in {', '.join(names)} ({why})")
        for name in names:
            _put(config, changes, name, value)
    return config.model_copy(update=changes), reasons


def with_types_of(config: RunConfig, settled: RunConfig) -> RunConfig:
    """``config`` with the type that ``settled`` has in the place of each ``auto``."""
    changes: dict[str, object] = {}
    if config.base.dtype == AUTO:
        changes["base"] = config.base.model_copy(update={"dtype": settled.base.dtype})
    there = dict(_precise(settled))
    for name, section in _precise(config):
        if section.mixed_precision == AUTO and name in there:
            _put(config, changes, name, there[name].mixed_precision)
    return config.model_copy(update=changes)


def slow_choices(config: RunConfig) -> Iterator[str]:
    """A warning for each bfloat16 that the config names though this machine is known to be slow at it."""
    named = [name for name, section in _precise(config) if section.mixed_precision == "bf16"]
    found = {f"{name}.mixed_precision": _device(config, name) for name in named}
    if config.base.dtype == "bfloat16":
        found["base.dtype"] = "cpu" if "cpu" in devices(config) else "cuda"
    slow = [name for name, device in found.items() if device == "cpu" and (v := _by_table()) is not None and not v.fast]
    if slow and config.cluster.address == "local":
        verdict = _by_table()
        assert verdict is not None
        yield f"{', '.join(slow)}: bfloat16, but {verdict.why}: set auto, which takes what is fast here"


@lru_cache
def bfloat16_on(device: str, width: int = WIDTH) -> TypeVerdict:
    """Whether bfloat16 is fast on ``cpu`` or ``cuda``; the same answer each time in one process."""
    if device == "cpu":
        return _by_table() or _measured(width)
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if not names:
        return TypeVerdict(True, "GPUs of the workers, which the driver does not see, are taken to have it")
    fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return TypeVerdict(fast, f"{names[0]} {'computes in bfloat16' if fast else 'has no bfloat16 in hardware'}")


# -- devices and sections ----------------------------------------------------------------------------------------------


def _precise(config: RunConfig) -> Iterator[tuple[str, Training | Improve]]:
    """Name and settings of each stage with ``mixed_precision``."""
    yield from offline_sections(config)
    if config.improve is not None:
        yield IMPROVE, config.improve


def _put(config: RunConfig, changes: dict[str, object], name: str, value: str) -> None:
    if name == "base.train":
        base = changes.get("base", config.base)
        assert isinstance(base, Base) and base.train is not None
        changes["base"] = base.model_copy(update={"train": base.train.model_copy(update={"mixed_precision": value})})
        return
    changes[name] = getattr(config, name).model_copy(update={"mixed_precision": value})


def _device(config: RunConfig, name: str) -> str:
    """Where a stage's gradient is computed."""
    import torch

    if name == IMPROVE:
        return "cuda" if config.cluster.gpus_per_learner else "cpu"
    section = dict(offline_sections(config))[name]
    alone = section.num_workers == 1 and torch.cuda.is_available() and name != "base.train"
    return "cuda" if section.gpus_per_worker or alone else "cpu"


def devices(config: RunConfig) -> set[str]:
    """Where the base LM is computed."""
    found = {_device(config, name) for name, _ in offline_sections(config) if name != "base.train"}
    if config.improve is not None or config.evaluation is not None:
        found.add("cuda" if config.rollout.gpus_per_worker else "cpu")
    return found or {"cpu"}


# -- the base LM -------------------------------------------------------------------------------------------------------


def _base_type(config: RunConfig, stored: _Stored) -> tuple[str, str]:
    if stored.dtype in (FULL, AUTO):
        return stored.dtype, "as its weights are stored"
    verdicts = {
        device: bfloat16_on(device, stored.width)
        if stored.dtype == "bfloat16"
        else TypeVerdict(device == "cuda", "float16 is slow on processors, fast on GPUs")
        for device in sorted(devices(config))
    }
    slow = [verdict.why for verdict in verdicts.values() if not verdict.fast]
    if not slow:
        return stored.dtype, f"as its weights are stored; {'; '.join(v.why for v in verdicts.values())}"
    processes = 1 + (config.most_workers if config.cluster.address == "local" else 1)
    needed, free = 4 * stored.parameters * processes, free_memory()
    if needed > free:
        return stored.dtype, (
            f"{slow[0]}, but float32 needs {needed / 2**30:.1f} GiB for {processes} copies of the base LM, and "
            f"{free / 2**30:.1f} GiB are free; fewer rollout.num_workers need less"
        )
    return FULL, slow[0]


def _stored(config: RunConfig) -> _Stored:
    from latent_control.bases.adapters import sources_of
    from latent_control.bases.loading import local_folder
    from latent_control.bases.weight_files import read_folder
    from pipeline.preflight.base_model import Unreachable, base_config_and_tokenizer

    if config.base.train is not None:
        return _Stored(FULL, config.base.train.architecture.hidden_size, 0)
    try:
        model = base_config_and_tokenizer(config)[0]
        folder = local_folder(sources_of(config.base.model)[0])
    except Unreachable:  # the workers may reach it
        return _Stored(AUTO, WIDTH, 0)
    files = None
    if folder is not None:
        with suppress(ValueError):  # weights of another kind, or files that the check of them speaks of
            files = read_folder(folder)
    said = getattr(model, "dtype", None) or (files.dtype if files is not None else None)
    dtype = str(said).removeprefix("torch.")
    known = dtype in (FULL, "bfloat16", "float16") and getattr(model, "quantization_config", None) is None
    return _Stored(
        dtype if known else AUTO,
        getattr(model.get_text_config(), "hidden_size", WIDTH),
        sum(map(prod, files.shapes.values())) if files is not None else 0,
    )


def parameters_of(config: RunConfig) -> int:
    """Of the base LM, by its files; 0 where they are not here."""
    return _stored(config).parameters


def free_memory() -> int:
    """Bytes that new processes may take: of the machine, and of the container where it has a limit."""
    free = psutil.virtual_memory().available
    try:
        limit, used = (path.read_text().strip() for path in MEMORY)
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no container, or "max"
        return free


# -- the processor -----------------------------------------------------------------------------------------------------


def _by_table() -> TypeVerdict | None:
    """The verdict on this processor; ``None``: measure."""
    import torch

    flags = torch.cpu.get_capabilities()
    limits = [f"{name}={value}" for name in LIMITS if (value := os.environ.get(name))]
    low = [limit for limit in limits if limit.partition("=")[2].upper() in BELOW and not limit.startswith("ATEN")]
    native = [flag for flag in NATIVE if flags.get(flag)]
    old = flags.get("architecture") == "x86_64" and not flags.get("avx512_f") and not native
    if low or old:
        reason = low[0] if low else "this processor has neither AVX-512 nor AMX"
        return TypeVerdict(False, f"{reason}: bfloat16 is converted to float32 and back")
    if native and not limits:
        return TypeVerdict(True, f"this processor computes in bfloat16 ({native[0]})")
    return None


@lru_cache
def _measured(width: int) -> TypeVerdict:
    """Matrix products [rows, D] x [D, 4 D] of decoding and of training, in both types by turns."""
    import torch

    width = min(width, WIDEST)
    types, spent, done = (torch.float32, torch.bfloat16), [0.0, 0.0], 0
    cases = [
        [(torch.ones(rows, width, dtype=t), torch.ones(4 * width, width, dtype=t)) for rows in (16, 128)] for t in types
    ]
    end = time.perf_counter() + SECONDS
    while done < 2 or time.perf_counter() < end:
        for index, products in enumerate(cases):
            started = time.perf_counter()
            for rows, weight in products:
                torch.nn.functional.linear(rows, weight)
            spent[index] += (time.perf_counter() - started) * (done > 0)  # the first round only warms up
        done += 1
    ratio = spent[0] / max(spent[1], 1e-9)
    return TypeVerdict(ratio >= 1, f"measured: bfloat16 has {ratio:.2g} of float32's speed here")
