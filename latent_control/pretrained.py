"""Saving and loading: safetensors and JSON, the base LM by reference with its hash or bundled; published CoLA
checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from latent_control.bases.loading import load_config
from latent_control.bases.weight_files import Shape, read_shapes
from latent_control.tower import Tower

if TYPE_CHECKING:
    from latent_control.model import LatentActionConfig, LatentActionLM

CONFIG, WEIGHTS, BASE = "latent_action_config.json", "latent_actions.safetensors", "base"
FORMAT = 1


def weights_hash(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def array_hash(arrays: Mapping[str, np.ndarray]) -> str:
    """``weights_hash`` of numpy arrays."""
    # What comes out of Ray's object store is read-only, which torch warns of.
    return weights_hash(
        (name, torch.from_numpy(np.require(array, requirements=("C", "W")))) for name, array in arrays.items()
    )


def world_hash(model: LatentActionLM) -> str:
    """Hash of what turns a code into a token besides the base: codebook and merge module."""
    return weights_hash(
        (name, tensor) for name, tensor in model.new_modules().items() if name.startswith(("codebook", "merge"))
    )


def base_hash(model: LatentActionLM) -> str:
    """Hash of the base LM's weights."""
    return weights_hash(model.base.lm.named_parameters())


def save(model: LatentActionLM, folder: Path, *, bundle_base: bool, inverse_dynamics: bool) -> Path:
    """See ``LatentActionLM.save_pretrained``."""
    folder.mkdir(parents=True, exist_ok=True)
    keep = {
        k: v.contiguous()
        for k, v in model.new_modules().items()
        if inverse_dynamics or not k.startswith("inverse_dynamics.")
    }
    if bundle_base:
        model.base.lm.save_pretrained(folder / BASE)
    elif not model.base_source:
        raise ValueError("the base LM was handed over as a loaded model without a folder: save with bundle_base=True")
    source = BASE if bundle_base else reference(str(model.base_source), folder)
    config = {
        "format": FORMAT,
        "latent_actions": model.config_dict(),
        "inverse_dynamics": inverse_dynamics and model.inverse_dynamics is not None,
        "base": {"path": source, "bundled": bundle_base, "sha256": base_hash(model), "dtype": str(model.base.dtype)},
    }
    save_file(keep, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=1))
    return folder


def reference(source: str, folder: Path) -> str:
    """How a checkpoint in ``folder`` names its base: a hub id as it is, a neighbour in the same run relatively, else
    absolutely."""
    path = Path(source)
    if not path.exists():
        return source
    path, parent = path.resolve(), folder.resolve().parent
    return os.path.relpath(path, folder.resolve()) if path.is_relative_to(parent) else str(path)


def load(
    cls: type[LatentActionLM],
    folder: Path,
    *,
    base: str | Path | PreTrainedModel | None,
    dtype: str | torch.dtype,
    trust_remote_code: bool,
) -> LatentActionLM:
    """See ``LatentActionLM.from_pretrained``."""
    if (folder / CONFIG).is_file():
        return _load_ours(cls, folder, base, dtype, trust_remote_code)
    published = folder / "config.json"
    if published.is_file() and "num_code" in json.loads(published.read_text()):
        return _load_published(cls, folder, dtype)
    raise ValueError(
        f"no latent-action checkpoint in {str(folder)!r}: neither {CONFIG} nor a config.json with num_code is there"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The saved description of a checkpoint.

    Raises:
        ValueError: it is missing, no JSON, or of another format.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    found = config.get("format") if isinstance(config, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} has format {found!r}, this version reads {FORMAT}")
    if lost := {"latent_actions", "inverse_dynamics", "base"} - config.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(lost))}: it is damaged, take another checkpoint")
    return config


def read_shape(folder: Path) -> LatentActionConfig:
    """The shape of a checkpoint's new modules.

    Raises:
        ValueError: the config is missing, damaged, or has settings this version does not know.
    """
    from latent_control.model import LatentActionConfig

    settings = read_config(folder)["latent_actions"]
    if unknown := settings.keys() - {field.name for field in dataclasses.fields(LatentActionConfig)}:
        raise ValueError(f"{folder / CONFIG} has unknown settings: {', '.join(sorted(unknown))}")
    return LatentActionConfig(**settings)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path}: {error}; take another checkpoint") from error


def base_path(folder: str | Path) -> str:
    """Where the base LM (and its tokenizer) of a checkpoint lies: a folder or a hub id."""
    recorded = str(read_config(Path(folder))["base"]["path"])
    beside = Path(folder) / recorded
    return str(beside.resolve()) if beside.is_dir() else recorded


def tokenizer_path(folder: str | Path) -> str:
    """Where the tokenizer of a checkpoint lies: an export has it inside, else it is with the base LM."""
    return str(folder) if (Path(folder) / "tokenizer_config.json").is_file() else base_path(folder)


def with_policy(source: Path, folder: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Write checkpoint ``source`` to ``folder`` with the trained policy ``weights`` in place of its own; the base is
    not loaded."""
    tensors = read_weights(source / WEIGHTS)
    for name, array in weights.items():
        tensors[f"policy.{name}"] = torch.from_numpy(np.ascontiguousarray(array))
    config = read_config(source)
    config["base"] |= {"path": reference(base_path(source), folder), "bundled": False}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=1))


def load_policy(folder: str | Path, *, trust_remote_code: bool = False) -> Tower:
    """The latent policy of a checkpoint alone, without loading the base LM's weights.

    Raises:
        ValueError: the checkpoint is missing or damaged, or its policy's tensors are not all there.
    """
    folder = Path(folder)
    shape = read_shape(folder)
    base_config = load_config(base_path(folder), trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(base_config, trust_remote_code=trust_remote_code).get_decoder()
    policy = Tower(decoder, shape.policy_layers, shape.num_actions)
    require_tensors(
        folder,
        {f"policy.{name}": tuple(t.shape) for name, t in policy.state_dict().items()},
        read_shapes(folder / WEIGHTS),
        "policy.",
    )
    with safe_open(folder / WEIGHTS, framework="pt") as tensors:
        policy.load_state_dict({name: tensors.get_tensor(f"policy.{name}") for name in policy.state_dict()})
    return policy


def _load_ours(
    cls: type[LatentActionLM],
    folder: Path,
    base: str | Path | PreTrainedModel | None,
    dtype: str | torch.dtype,
    trust_remote_code: bool,
) -> LatentActionLM:
    from latent_control.model import load_base

    saved, shape = read_config(folder), read_shape(folder)
    recorded = saved["base"]
    source: str | Path | PreTrainedModel = base if base is not None else base_path(folder)
    if base is None and str(source).startswith((".", "/")) and not Path(str(source)).is_dir():
        raise ValueError(
            f"the base LM of {folder} lay at {source}, where it is no longer: say where it is now (base=FOLDER, or "
            "--base FOLDER)"
        )
    lm = load_base(source, dtype=dtype, trust_remote_code=trust_remote_code)
    model = cls(lm, shape, inverse_dynamics=saved["inverse_dynamics"])
    model.base_source = None if isinstance(source, PreTrainedModel) else str(source)
    # In another precision the bytes differ by intention.
    if str(lm.dtype) == recorded["dtype"] and (found := base_hash(model)) != recorded["sha256"]:
        raise ValueError(
            f"the base LM at {source} is not the one {folder} was trained on (hash {found[:12]}, recorded "
            f"{recorded['sha256'][:12]})"
        )
    _fill(model, read_weights(folder / WEIGHTS), folder)
    return model.eval()


def _fill(model: LatentActionLM, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Load the new modules' tensors; every one must be there and fit."""
    wanted, found = ({name: tuple(t.shape) for name, t in some.items()} for some in (model.new_modules(), tensors))
    require_tensors(folder, wanted, found)
    model.load_state_dict(tensors, strict=False)


def require_tensors(folder: Path, wanted: dict[str, Shape], found: dict[str, Shape], prefix: str = "") -> None:
    """``ValueError`` unless ``found`` are the names and shapes of ``wanted``; tensors without ``prefix`` may be there
    too."""
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is unknown" for name in found.keys() - wanted.keys() if name.startswith(prefix)]
    problems += [f"{n} is {found[n]}, not {wanted[n]}" for n in wanted.keys() & found.keys() if found[n] != wanted[n]]
    if problems:
        raise ValueError(f"{folder} does not fit its own config: " + "; ".join(sorted(problems)[:8]))


PUBLISHED_NAMES = (
    ("model.action_layers.", "inverse_dynamics.decoder.layers."),
    ("model.action_norm.", "inverse_dynamics.decoder.norm."),
    ("model.action_head.", "inverse_dynamics.head."),
    ("model.policy_layers.", "policy.decoder.layers."),
    ("model.policy_norm.", "policy.decoder.norm."),
    ("model.policy_head.", "policy.head."),
    ("model.action_merge_layers.", "merge.blocks."),
)


def _load_published(cls: type[LatentActionLM], folder: Path, dtype: str | torch.dtype) -> LatentActionLM:
    """A checkpoint of the published CoLA code: one state dict with base, codebook [D, N], towers and merge layers."""
    from latent_control.model import LatentActionConfig

    raw = json.loads((folder / "config.json").read_text())
    tensors = {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in read_weights(file).items()}
    if not tensors:
        raise ValueError(
            f"{folder} has no model*.safetensors; convert the published checkpoint to safetensors first (pickles are "
            "not read)"
        )
    codebook = tensors.pop("model.action_code_book.weight", None)
    ours = {} if codebook is None else {"codebook": codebook.T.contiguous()}
    for theirs, mine in PUBLISHED_NAMES:
        ours |= {
            mine + name.removeprefix(theirs): tensors.pop(name) for name in list(tensors) if name.startswith(theirs)
        }
    known = {
        k: v for k, v in raw.items() if k not in {"num_code", "num_action_layer", "num_dyna_layer", "num_policy_layer"}
    }
    base_config = AutoConfig.for_model(known.pop("model_type", "llama"), **known)
    target = next(iter(tensors.values())).dtype if dtype == "auto" else dtype
    lm = (
        AutoModelForCausalLM.from_config(base_config, dtype=target, trust_remote_code=False)
        .eval()
        .requires_grad_(False)
    )
    wanted = {name: tuple(t.shape) for name, t in lm.state_dict().items()}
    if base_config.tie_word_embeddings and "lm_head.weight" not in tensors:
        wanted.pop("lm_head.weight")
    # Older versions of Llama saved this buffer, which today's makes itself.
    held = {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    require_tensors(folder, wanted, {name: tuple(t.shape) for name, t in held.items()})
    lm.load_state_dict(held, strict=False)
    config = LatentActionConfig(
        num_actions=raw["num_code"],
        head="official",
        inverse_dynamics_layers=raw["num_action_layer"],
        merge_layers=raw["num_dyna_layer"],
        policy_layers=raw["num_policy_layer"],
        inverse_dynamics_reads="final",
        policy_reads="final",
    )
    model = cls(lm, config)
    _fill(model, ours, folder)
    return model.eval()
