"""Pretrained models, the one door to ``transformers``' loaders: a model whose files do not hold all of its weights is
refused.

``from_pretrained`` fills what is missing with random numbers and goes on. Here a folder is first judged by its files
alone: the model is built without memory (torch's meta device) and given the names and shapes of the safetensors
headers, by ``transformers``' own loader, so
that its renamings, mergings and exceptions hold. What the loader says after the real load is the second wall. Left out:
the values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from re import compile as pattern
from typing import Any, NamedTuple

import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import is_accelerate_available, logging

from latent_control.bases.foreign_code import BASE_KEY, code_refused
from latent_control.bases.support import require_supported
from latent_control.bases.weight_files import (
    Incomplete,
    WeightFiles,
    absent_by_number,
    file_problem,
    first_names,
    read_folder,
)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is loaded, and what its files may lack: ``Kind(auto=AutoModelForCausalLM, what="causal language
    model")``."""

    auto: Any
    what: str
    new_head: bool = False
    """The head is new where the files have none, and another model's head in them is not looked at."""
    arguments: Mapping[str, Any]
    """For the config, e.g. the number of outputs."""


BASE = Kind(auto=AutoModelForCausalLM, what="causal language model", arguments={})
REWARD_MODEL = Kind(auto=AutoModelForSequenceClassification, what="reward model", arguments={"num_labels": 1})
UNTRAINED_REWARD_MODEL = Kind(
    auto=AutoModelForSequenceClassification,
    what="model to train a reward model from",
    arguments={"num_labels": 1},
    new_head=True,
)
ENCODER = Kind(auto=AutoModel, what="text encoder", arguments={}, new_head=True)

_NO_MODEL = (KeyError, TypeError, AttributeError, ArithmeticError, StrictDataclassError)
"""What ``transformers`` raises where a config.json describes no model that can be."""
# Buffers that models once saved and that today's make themselves; transformers knows them for some architectures only.
_OLD_BUFFER = pattern(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids|masked_bias|causal_mask)$")
_OLD_MASK = pattern(r"(^|\.)(attn|attention)\.bias$")  # a causal mask [1, 1, n, n] or [n, n], not the bias of a layer
_POOLER = pattern(r"(^|\.)pooler\.")  # above the last hidden states, which is all that is read here
_PLACEHOLDERS = {f"{name}_token" for name in ("image", "audio", "video", "boi", "eoi", "boa", "eoa", "pad")}
"""Tokens of a tokenizer that text-only models share with those that see and hear (Gemma 3's 262,145th), and the one
for padding, which is masked everywhere."""


_FITTING = "take the tokenizer that came with the model, or resize the model (resize_token_embeddings) and save it"
NOT_HERE = "{} is not, or not all, on this machine yet, so its files were not looked at"


class FolderVerdict(NamedTuple):
    """What a folder's files are worth, e.g. ``FolderVerdict(problems=[], unjudged="it is quantised", rows=48)``."""

    problems: list[str]
    """Each makes the model another one than was saved; with the remedy."""
    unjudged: str | None
    """Why names and shapes were not compared; ``None`` when they were."""
    rows: int | None
    """Of the embedding; ``None`` where it is not known."""


def load_config(
    source: str | Path,
    *,
    trust_remote_code: bool,
    key: str | None = BASE_KEY,
    local_files_only: bool = False,
    **arguments: Any,
) -> PreTrainedConfig:
    """``AutoConfig.from_pretrained``, without a question about code.

    Raises: OSError, ValueError, KeyError: there is no config ``transformers`` knows, or it needs code of its own
        (``key`` allows it).
    """
    try:
        with code_refused(source, key=key):
            return AutoConfig.from_pretrained(
                source, trust_remote_code=trust_remote_code, local_files_only=local_files_only, **arguments
            )
    except (TypeError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise ValueError(f"config.json of {source} describes no model: {' '.join(str(error).split())}") from error


def load_model(
    source: str | Path, kind: Kind, *, dtype: str | torch.dtype, trust_remote_code: bool, key: str | None = BASE_KEY
) -> PreTrainedModel:
    """A whole model from a folder or a hub id. Safetensors only: other weight files are pickles, which run code.

    Raises: ValueError: nothing of that kind is there, tensors are missing, too many or of another shape, or it needs
        code of its own.
    """
    require_whole(source, kind, trust_remote_code=trust_remote_code, key=key)
    try:
        with code_refused(source, key=key):
            model, info = kind.auto.from_pretrained(
                str(source),
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **kind.arguments,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError, *_NO_MODEL) as error:
        raise ValueError(f"no {kind.what} at {str(source)!r}: {type(error).__name__}: {error}") from error
    # Quantised files hold more than the model's own tensors, and code of its own may read what it likes.
    other = set() if _unjudgeable(model.config, kind, trust_remote_code) else info["unexpected_keys"]
    if problems := _faults(model, kind, info | {"unexpected_keys": other}, None, str(source)):
        raise ValueError("; ".join(problems))
    return model


def require_whole(source: str | Path, kind: Kind, *, trust_remote_code: bool, key: str | None = BASE_KEY) -> None:
    """``ValueError`` with all that ``examine`` finds wrong with the files of ``source``."""
    if problems := examine(source, kind, trust_remote_code=trust_remote_code, key=key).problems:
        raise ValueError("; ".join(problems))


def examine(source: str | Path, kind: Kind, *, trust_remote_code: bool, key: str | None = BASE_KEY) -> FolderVerdict:
    """Whether the files of ``source`` hold the model that its config describes; no weight is read, nothing is
    downloaded.

    Raises:
        ValueError: the config is none that ``transformers`` knows, or needs code of its own.
    """
    folder = local_folder(source)
    if folder is None:
        return FolderVerdict([], NOT_HERE.format(source), None)
    verdict = _weights(source, folder, kind, trust_remote_code, key)
    try:
        tokens = tokenizer_problem(folder, verdict.rows, model=source)
    except ValueError as error:
        tokens = str(error)
    return verdict if tokens is None else verdict._replace(problems=[*verdict.problems, tokens])


def _weights(source: str | Path, folder: Path, kind: Kind, trust_remote_code: bool, key: str | None) -> FolderVerdict:
    config = _config(folder, kind, trust_remote_code, key)
    if config.model_type == "latent_control":
        return FolderVerdict(
            [f"{source} is a model with latent actions, not its base LM; give the base LM's folder"], None, None
        )
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if getattr(config, "transformers_weights", None) or any(folder.glob("shard-*-model-*.safetensors")):
        return FolderVerdict([], f"{source} keeps its weights in files of other names, which were not looked at", rows)
    try:
        files = read_folder(folder)
    except ValueError as error:
        if isinstance(error, Incomplete) and not Path(source).is_dir() and not constants.HF_HUB_OFFLINE:
            return FolderVerdict(
                [], NOT_HERE.format(source), rows
            )  # what the hub's cache lacks is downloaded by the loader
        return FolderVerdict([str(error)], None, rows)
    if (folder / "adapter_config.json").is_file():
        return FolderVerdict(
            [f"{folder} holds a whole model and an adapter; move the adapter's files to a folder of their own"],
            None,
            rows,
        )
    # transformers lays a model out without memory only beside accelerate; without it, loading finds the same faults.
    alone = None if is_accelerate_available() else "accelerate is not installed"
    if why := _unjudgeable(config, kind, trust_remote_code) or alone:
        return FolderVerdict(
            [], f"{source}: {why}, so its tensors' names and shapes were not compared with the model's", rows
        )
    return _compared(folder, kind, config, files)


def local_folder(source: str | Path) -> Path | None:
    """Where the files of a folder or of a hub id lie on this machine; ``None`` for a hub id that is not cached."""
    if Path(source).is_dir():
        return Path(source)
    try:
        cached = try_to_load_from_cache(str(source), "config.json")
    except ValueError:  # no hub id
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _config(folder: Path, kind: Kind, trust_remote_code: bool, key: str | None) -> PreTrainedConfig:
    if problem := file_problem(folder / "config.json") if (folder / "config.json").exists() else None:
        raise ValueError(problem)
    try:
        return load_config(
            folder, trust_remote_code=trust_remote_code, key=key, local_files_only=True, **kind.arguments
        )
    except (OSError, KeyError) as error:
        raise ValueError(f"no {kind.what} at {str(folder)!r}: {error}") from error


def _unjudgeable(config: PreTrainedConfig, kind: Kind, trust_remote_code: bool) -> str | None:
    """Why a model cannot be built without its weights."""
    if getattr(config, "quantization_config", None) is not None:
        return "it is quantised"
    if trust_remote_code and kind.auto.__name__ in getattr(config, "auto_map", {}):
        return "it is built by code of its own"
    return None


def _compared(folder: Path, kind: Kind, config: PreTrainedConfig, files: WeightFiles) -> FolderVerdict:
    """Names and shapes of ``files`` against those of the model that ``config`` describes."""
    try:
        with quiet():
            model, info = on_meta(kind, config, files)
        embedding = model.get_input_embeddings()
    except (ValueError, ArithmeticError, StrictDataclassError) as error:
        said = str(error)
        if said.startswith("Unrecognized configuration class"):  # a list of all others follows
            said = f"transformers has none for model_type {config.model_type!r}; take another model"
        raise ValueError(f"no {kind.what} at {str(folder)!r}: {said}") from error
    except RuntimeError as error:  # tensors that go into one, such as a layer's experts, do not fit each other
        if "conversion" not in str(error):
            return FolderVerdict(
                [], f"{folder}: {type(config).__name__} cannot be built without weights ({error})", None
            )
        gaps = absent_by_number(files.shapes)
        which = f"tensors that are joined when loading do not fit each other; missing: {first_names(gaps) or 'none'}"
        return FolderVerdict([f"{folder / files.listed}: {which}; copy the folder again, or save it again"], None, None)
    except ImportError as error:
        raise ValueError(f"no {kind.what} at {str(folder)!r}: {' '.join(str(error).split())}") from error
    except (NotImplementedError, AttributeError, TypeError, KeyError, IndexError) as error:
        return FolderVerdict([], f"{folder}: {type(config).__name__} cannot be built without weights ({error})", None)
    if kind is BASE:
        try:
            require_supported(model)
        except ValueError as error:
            return FolderVerdict([f"{folder}: {error}"], None, None)
    return FolderVerdict(
        [*_doubled(model, files, folder), *_faults(model, kind, info, files, str(folder))],
        None,
        None if embedding is None else int(embedding.weight.shape[0]),
    )


def on_meta(kind: Kind, config: PreTrainedConfig, files: WeightFiles) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model without memory, and what the loader says of the files' names and shapes; torch's random streams are
    left alone."""
    tensors = {name: torch.empty(shape, device="meta") for name, shape in files.shapes.items()}
    with torch.device("meta"):
        empty = kind.auto.from_config(config, trust_remote_code=False)
    model, info = type(empty).from_pretrained(
        None,
        config=empty.config,
        state_dict=tensors,
        device_map={"": "meta"},
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    return model, info


def _faults(
    model: PreTrainedModel, kind: Kind, info: Mapping[str, Any], files: WeightFiles | None, source: str
) -> list[str]:
    """What ``info`` says of missing, superfluous and mis-shaped tensors, less what is known to be harmless."""
    shapes = {} if files is None else files.shapes
    listed = source if files is None else str(Path(source) / files.listed)
    missing = sorted(
        name for name in info["missing_keys"] if not (kind.new_head and (_POOLER.search(name) or _above(model, name)))
    )
    other = sorted(
        name
        for name in info["unexpected_keys"]
        if not (_old_buffer(name, shapes.get(name)) or (kind.new_head and _above(model, name)))
    )
    wrong = sorted((name, tuple(found), tuple(wanted)) for name, found, wanted in info["mismatched_keys"])
    total = len(model.state_dict())
    problems = []
    if missing:
        problems.append(
            f"{listed} lacks {len(missing)} of the model's {total} tensors: {first_names(missing)}; "
            f"{_remedy(model, missing, other)}"
        )
    if other:
        problems.append(
            f"{listed} has {len(other)} tensors that the {type(model).__name__} of its config.json has not: "
            f"{first_names(other)}; take config.json and weights of the same model"
        )
    if wrong:
        shown = first_names(f"{name} is {list(found)}, not {list(wanted)}" for name, found, wanted in wrong)
        problems.append(
            f"{listed} has {len(wrong)} tensors of another shape than config.json says: {shown}; "
            "take config.json and weights of the same model"
        )
    return problems


def _doubled(model: PreTrainedModel, files: WeightFiles, folder: Path) -> list[str]:
    """Tensors that are there with and without the model's prefix: the loader takes one for the other."""
    prefix = f"{model.base_model_prefix}."
    twice = sorted(name for name in files.shapes if prefix + name in files.shapes)
    if not twice:
        return []
    return [
        f"{folder / files.listed} has {len(twice)} tensors twice, with and without {prefix!r}: {first_names(twice)}; "
        "save the model again with save_pretrained"
    ]


def _remedy(model: PreTrainedModel, missing: list[str], other: list[str]) -> str:
    head = model.get_output_embeddings()
    names = {name for name, module in model.named_modules() if module is head}
    if {name.rpartition(".")[0] for name in missing} <= names:
        return "it was saved without its head: save it with AutoModelForCausalLM, not AutoModel"
    if other:
        return "take config.json and weights of the same model"
    return "copy the folder again, or save it again with save_pretrained"


def _old_buffer(name: str, shape: tuple[int, ...] | None) -> bool:
    mask = _OLD_MASK.search(name) is not None and (shape is None or len(shape) != 1)
    return mask or _OLD_BUFFER.search(name) is not None


def _above(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor belongs to a head, not to the blocks and embeddings below it."""
    stack = model.base_model
    if stack is not model:
        return not name.startswith(f"{model.base_model_prefix}.")
    parts = {child for child, _ in stack.named_children()}
    return name.removeprefix(f"{model.base_model_prefix}.").partition(".")[0] not in parts


def tokenizer_problem(folder: Path, rows: int | None, *, model: str | Path, remedy: str = _FITTING) -> str | None:
    """Why the tokenizer in ``folder`` does not go with an embedding of ``rows`` rows; without ``tokenizer.json`` it is
    not looked at.

    Args:
        model: whose embedding it is, for the message.

    Raises:
        ValueError: ``tokenizer.json`` cannot be read.
    """
    path = folder / "tokenizer.json"
    if rows is None or not path.exists():
        return None
    spare, ids = _placeholders(folder), _token_ids(path)
    ids |= _configured_tokens(folder, ids)
    beyond = sorted((number, token) for token, number in ids.items() if number >= rows and token not in spare)
    if not beyond:
        return None
    return (
        f"{path} has {len(beyond)} tokens beyond the {rows} rows of the embedding of {model}: "
        f"{first_names(token for _, token in beyond)}; {remedy}"
    )


def _token_ids(path: Path) -> dict[str, int]:
    """Id of each token of a ``tokenizer.json``; read as JSON, which is as fast as building the tokenizer."""
    if problem := file_problem(path):
        raise ValueError(problem)
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = said["model"]["vocab"]
        # A unigram model lists its tokens with their scores, in the order of their ids.
        ids = (
            vocabulary
            if isinstance(vocabulary, dict)
            else {token: number for number, (token, _) in enumerate(vocabulary)}
        )
        return {str(token): int(number) for token, number in ids.items()} | {
            str(token["content"]): int(token["id"]) for token in said.get("added_tokens") or []
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a tokenizer ({type(error).__name__}: {error}); copy it again") from error


def _configured_tokens(folder: Path, known: Mapping[str, int]) -> dict[str, int]:
    """Ids of the tokens that ``tokenizer_config.json`` adds to those of ``tokenizer.json``: those it lists, and special
    ones that are not known, which get the next ids."""
    try:
        said = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        added = {str(token["content"]): int(number) for number, token in said.get("added_tokens_decoder", {}).items()}
        special = [value for name, value in said.items() if name.endswith("_token")]
        special += said.get("additional_special_tokens") or []
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return {}
    names = [token.get("content") if isinstance(token, dict) else token for token in special]
    new = [name for name in dict.fromkeys(names) if isinstance(name, str) and name not in {*known, *added}]
    following = max([*known.values(), *added.values()], default=-1) + 1
    return added | {name: following + place for place, name in enumerate(new)}


def _placeholders(folder: Path) -> set[str]:
    """Tokens that stand for pictures and sounds, and the pad token: no model reads their embedding here."""
    try:
        said = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        sections = [said, *(said.get(name) for name in ("extra_special_tokens", "model_specific_special_tokens"))]
    except (OSError, ValueError, AttributeError, RecursionError):
        return set()
    named = [section for section in sections if isinstance(section, dict)]
    found = [section[name] for section in named for name in _PLACEHOLDERS & section.keys()]
    return {str(token["content"] if isinstance(token, dict) else token) for token in found}


@contextmanager
def quiet() -> Iterator[None]:
    """Without ``transformers``' report and progress bar: nothing is loaded, and what is wrong is said by us."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
