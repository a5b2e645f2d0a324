"""Bases adapted by LoRA: a PEFT adapter's folder is merged once into a model that ``from_pretrained`` can load.

Merged, it costs nothing in decoding, and everything that reads a base LM (vLLM, exports, hashes) takes it as it is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download

from latent_control.bases import smollm2
from latent_control.bases.loading import (
    BASE,
    examine,
    load_config,
    load_model,
    local_folder,
    on_meta,
    quiet,
    tokenizer_problem,
)
from latent_control.bases.model_cache import cache_root, content_hash, kept
from latent_control.bases.weight_files import Incomplete, Shape, file_problem, first_names, read_folder, read_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
INSTALL = "pip install 'peft>=0.21'"
FORMAT = 2
"""Of merged folders: those of an older one are rebuilt."""
_READ = (".json", ".safetensors", ".jinja", ".model", ".txt", ".py")
"""Suffixes of what merging reads; beside an adapter its training's state may lie."""
_IN_FILES = "base_model.model."
"""In front of the base's own names in an adapter's file."""
_COPY = re.compile(r"\.(modules_to_save|original_module)(?=\.)")
_WITH_ROWS = (
    "save the adapter with embedding and head (save_embedding_layers=True, or both in modules_to_save), or take the "
    "tokens that were added out of its tokenizer"
)


def is_adapter(model: str | Path) -> bool:
    """Whether ``model`` is the folder of a PEFT adapter."""
    return (Path(model) / CONFIG).is_file() and not (Path(model) / "config.json").is_file()


def adapter_folder(model: str, *, download: bool = False) -> Path | None:
    """Where the PEFT adapter ``model`` lies, a folder or a hub id; ``None`` when it is no adapter, or a hub id that is
    not on this machine.

    Args:
        download: fetch it from the hub if it is not here.
    """
    if Path(model).exists():
        return Path(model) if is_adapter(model) else None
    if local_folder(model) is not None:
        return None
    try:
        cached = hf_hub_download(model, CONFIG, local_files_only=not download)
        if not download:
            return Path(cached).parent
        return Path(snapshot_download(model, allow_patterns=[f"*{suffix}" for suffix in _READ]))
    except (OSError, ValueError):  # no such file there, no hub id, or the hub does not answer
        return None


def adapted_base(adapter: str | Path) -> str:
    """The base LM that an adapter is for: a folder (a relative one is relative to the adapter), or a hub id.

    Raises:
        ValueError: the adapter is not whole, not a safetensors file (others are pickles), or peft is missing.
    """
    folder = Path(adapter)
    try:
        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        name = said["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{folder / CONFIG} does not say base_model_name_or_path ({type(error).__name__}); save the adapter again"
        ) from error
    if not isinstance(name, str) or not name:
        raise ValueError(f"{folder / CONFIG} has base_model_name_or_path {name!r}; say which model the adapter is for")
    if said.get("megatron_config") is not None:
        raise ValueError(
            f"{folder / CONFIG} has a megatron_config, which names Python modules to import; remove it, "
            "or save without it"
        )
    if not (folder / WEIGHTS).exists():
        raise ValueError(
            f"{folder} has no {WEIGHTS}: save the adapter with safe_serialization=True (other files are pickles, "
            "which are not read)"
        )
    if problem := file_problem(folder / WEIGHTS):
        raise ValueError(problem)
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"{folder} is a PEFT adapter, but the package 'peft' is not installed; {INSTALL}")
    beside = folder / name
    return str(beside.resolve()) if not Path(name).is_absolute() and (beside / "config.json").is_file() else name


def sources_of(model: str) -> tuple[str, str]:
    """Where config and tokenizer of ``base.model`` lie, before anything is merged: folders or hub ids."""
    if adapter := adapter_folder(model):
        return adapted_base(adapter), tokenizer_source(adapter)
    folder = str(smollm2.smollm2_folder()) if model == smollm2.NAME else model
    return folder, folder


def tokenizer_source(adapter: str | Path) -> str:
    """Whose tokenizer the merged model gets: the adapter's own where it has one, else its base's."""
    return str(adapter) if (Path(adapter) / "tokenizer_config.json").is_file() else adapted_base(adapter)


def adapter_problems(adapter: str | Path, *, trust_remote_code: bool) -> tuple[list[str], str | None]:
    """What is wrong with an adapter and its base by their files alone, and why something was not compared.

    Raises: ValueError: as ``adapted_base``, or the base's config is none that ``transformers`` knows, or needs code of
        its own.
    """
    folder, base = Path(adapter), adapted_base(adapter)
    shapes = read_shapes(folder / WEIGHTS)
    verdict, place = examine(base, BASE, trust_remote_code=trust_remote_code), local_folder(base)
    if verdict.problems or verdict.unjudged or place is None:
        return verdict.problems, verdict.unjudged
    with quiet():
        lm, _ = on_meta(
            BASE, load_config(place, trust_remote_code=trust_remote_code, local_files_only=True), read_folder(place)
        )
    new, own = _resize(lm, shapes), _own_tensors(shapes)
    problems = list(_misfits(lm, folder, {name: torch.empty(shapes[name], device="meta") for name in own}))
    tokens = tokenizer_problem(
        Path(tokenizer_source(folder)), lm.get_input_embeddings().weight.shape[0], model=folder, remedy=_WITH_ROWS
    )
    head = f"{folder / WEIGHTS} has {new} new rows of the embedding, but not of the head; {_WITH_ROWS}"
    return [*problems, *([] if tokens is None else [tokens]), *([head] if new and not _has_head(lm, own) else [])], None


def merged_folder(adapter: str | Path, *, trust_remote_code: bool = False) -> Path:
    """The folder with base and adapter as one model, and the tokenizer; the first call merges.

    It is kept under the content of both folders: an adapter trained again in its place, or a base replaced in its own,
    is merged again. Content costs one pass over the files (about 2 s per GB); the hash of a file that has not been
    touched since is not made again.

    Raises:
        ValueError: as ``adapter_problems``, or something is wrong by them, or the files change meanwhile.
    """
    folder, base = Path(adapter), adapted_base(adapter)
    place = _whole_base(base, folder)
    key = _key(folder, place)

    def make(staged: Path) -> None:
        _merge(base, folder, staged, trust_remote_code)
        if _key(folder, place) != key:
            raise ValueError(f"{folder} or its base {base!r} changed while they were merged; try again")

    return kept(cache_root() / f"merged-{key[:16]}", make)


def _whole_base(base: str, adapter: Path) -> Path:
    """Where the base lies; one from the hub is downloaded first, for its content is asked for before it is loaded."""
    place = local_folder(base)
    try:
        if place is not None:
            read_folder(place)
            return place
    except Incomplete:
        if Path(base).is_dir():
            return Path(base)  # merging says what it lacks
    try:
        return Path(snapshot_download(base, allow_patterns=[f"*{suffix}" for suffix in _READ]))
    except (OSError, ValueError) as error:
        raise ValueError(f"the adapter {adapter} cannot be merged into its base {base!r}: {_line(error)}") from error


def _key(adapter: Path, base: Path) -> str:
    """Of the content of both."""
    digest = hashlib.sha256(f"{FORMAT}".encode())
    for folder in (adapter, base):
        for path in sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in _READ):
            digest.update(f"{path.name}:{content_hash(path)};".encode())
    return digest.hexdigest()


def _merge(base: str, adapter: Path, staged: Path, trust_remote_code: bool) -> None:
    """Write model and tokenizer as safetensors and JSON."""
    from peft import PeftModel

    from latent_control.text import load_tokenizer

    problems, _ = adapter_problems(adapter, trust_remote_code=trust_remote_code)
    if problems:
        raise ValueError("; ".join(problems))
    try:
        lm = load_model(base, BASE, dtype="auto", trust_remote_code=trust_remote_code)
        _resize(lm, read_shapes(adapter / WEIGHTS))
        with warnings.catch_warnings():
            # peft goes on with a part of the adapter that is missing; what is compared by the files need not be all.
            warnings.filterwarnings("error", "Found missing adapter keys")
            merged = PeftModel.from_pretrained(lm, str(adapter)).merge_and_unload(safe_merge=True)
        load_tokenizer(tokenizer_source(adapter), trust_remote_code=trust_remote_code).save_pretrained(staged)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, UserWarning) as error:
        raise ValueError(f"the adapter {adapter} cannot be merged into its base {base!r}: {_line(error)}") from error
    merged.save_pretrained(staged)


def _line(error: BaseException) -> str:
    """The message on one line, of long ones the beginning."""
    line = " ".join(str(error).split())
    return line if len(line) <= 600 else f"{line[:600]} ..."


def _own_tensors(shapes: Mapping[str, Shape]) -> list[str]:
    """Names of an adapter's tensors without the copies that peft writes of modules it keeps whole (modules_to_save)."""
    return [name for name in shapes if (plain := _COPY.sub("", name)) == name or plain not in shapes]


def _has_head(lm: PreTrainedModel, names: Iterable[str]) -> bool:
    """Whether an adapter with tensors of these names brings a head, or the embedding is the head."""
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    place = next((name for name, module in lm.named_modules() if module is head), None)
    tied = head is None or head.weight is embedding.weight or lm.config.get_text_config().tie_word_embeddings
    return bool(tied or any(name.startswith(f"{_IN_FILES}{place}.") and "lora_" not in name for name in names))


def _resize(lm: PreTrainedModel, shapes: Mapping[str, Shape]) -> int:
    """As many rows of embedding and head as the adapter's own embedding has, where it brings one (tokens were
    added); the number of new ones."""
    embedding = lm.get_input_embeddings()
    name = next(name for name, module in lm.named_modules() if module is embedding)
    own = (
        key for key in shapes if key.startswith(f"{_IN_FILES}{name}.") and key.endswith("weight") and "lora_" not in key
    )
    before: int = embedding.weight.shape[0]
    rows = next((shapes[key][0] for key in own if shapes[key]), before)
    if rows != before:
        lm.resize_token_embeddings(rows, mean_resizing=False)
    return max(0, rows - before)


def _misfits(lm: PreTrainedModel, adapter: Path, tensors: dict[str, torch.Tensor]) -> Iterator[str]:
    """How the tensors of an adapter differ from those that its config asks for, by peft's own loader."""
    from peft import PeftConfig, get_peft_model
    from peft.utils import set_peft_model_state_dict

    place = adapter / WEIGHTS
    try:
        config = PeftConfig.from_pretrained(str(adapter))
        config.inference_mode = True
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = False  # some begin from the base's values, which are not there
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this model has no name
            model = get_peft_model(lm, config)
        found: Any = set_peft_model_state_dict(model, dict(tensors), low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError) as error:
        yield f"{adapter / CONFIG} does not fit the base: {_line(error)}; take the base that the adapter was trained on"
        return
    except RuntimeError as error:
        yield f"{place} does not fit the base: {_line(error)}; take the base that the adapter was trained on"
        return
    own = ".default"  # the name peft gives a loaded adapter, which its file leaves out
    missing = sorted(name.replace(own, "") for name in found.missing_keys if f"{own}." in f"{name}.")
    if missing:
        yield (
            f"{place} lacks {len(missing)} tensors of the adapter: {first_names(missing)}; copy the folder again, "
            "or save it again"
        )
    if other := sorted(name.replace(own, "") for name in found.unexpected_keys):
        yield (
            f"{place} has {len(other)} tensors with no place in the base: {first_names(other)}; take the base that "
            "it was trained on"
        )
