"""Bases adapted by LoRA: a PEFT adapter's folder is merged once into a model that ``from_pretrained`` can load.

Merged, it costs nothing in decoding, and everything that reads a base LM (vLLM, exports, hashes) takes it as it is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

from latent_control.cache import cache_root, kept

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
INSTALL = "pip install -c requirements.lock -e '.[lora]'"


def is_adapter(model: str | Path) -> bool:
    """Whether ``model`` is the folder of a PEFT adapter."""
    return (Path(model) / CONFIG).is_file() and not (Path(model) / "config.json").is_file()


def adapted_base(adapter: str | Path) -> str:
    """The base LM that an adapter is for: a folder (a relative one is relative to the adapter), or a hub id.

    Raises:
        ValueError: the adapter is not whole, not a safetensors file (others are pickles), or peft is missing.
    """
    folder = Path(adapter)
    try:
        name = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / CONFIG} does not say base_model_name_or_path ({type(error).__name__}); save the adapter again"
        ) from error
    if not isinstance(name, str) or not name:
        raise ValueError(f"{folder / CONFIG} has base_model_name_or_path {name!r}; say which model the adapter is for")
    if not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"{folder} has no {WEIGHTS}: save the adapter with safe_serialization=True (other files are pickles, which are not read)"
        )
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"{folder} is a PEFT adapter, but the package 'peft' is not installed; {INSTALL}")
    beside = folder / name
    return str(beside.resolve()) if not Path(name).is_absolute() and (beside / "config.json").is_file() else name


def merged_folder(adapter: str | Path, *, trust_remote_code: bool = False) -> Path:
    """The folder with base and adapter as one model, and the tokenizer; the first call merges.

    Raises:
        ValueError: as ``adapted_base``, or the adapter does not fit its base.
    """
    folder, base = Path(adapter), adapted_base(adapter)
    digest = hashlib.sha256(str(Path(base).resolve() if Path(base).exists() else base).encode())
    for name in (CONFIG, WEIGHTS):
        digest.update((folder / name).read_bytes())
    return kept(cache_root() / f"merged-{digest.hexdigest()[:16]}", lambda staged: _merge(base, folder, staged, trust_remote_code))


def _merge(base: str, adapter: Path, staged: Path, trust_remote_code: bool) -> None:
    """Write model and tokenizer as safetensors and JSON."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from latent_control.text import load_tokenizer

    tokenizer = adapter if (adapter / "tokenizer_config.json").is_file() else base
    try:
        lm = AutoModelForCausalLM.from_pretrained(base, dtype="auto", trust_remote_code=trust_remote_code, use_safetensors=True)
        merged = PeftModel.from_pretrained(lm, str(adapter)).merge_and_unload(safe_merge=True)
        load_tokenizer(str(tokenizer), trust_remote_code=trust_remote_code).save_pretrained(staged)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        line = str(error).strip().partition("\n")[0]
        raise ValueError(f"the adapter {adapter} cannot be merged into its base {base!r}: {line[:300]}") from error
    merged.save_pretrained(staged)
