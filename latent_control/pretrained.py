"""Saving and loading: safetensors and JSON, the base LM by reference with its hash or bundled."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from latent_control.base_lm import BaseLM, load_base
from latent_control.bases.loading import load_config
from latent_control.bases.weight_files import read_shapes
from latent_control.config import LatentActionConfig
from latent_control.decoder_stack import DecoderStack, decoder_blocks, decoder_of
from latent_control.policies.latent import LatentPolicy, latent_policy
from latent_control.published import read_published
from latent_control.tensor_files import as_readable_as, read_weights, require_tensors

CONFIG, WEIGHTS, BASE = "latent_action_config.json", "latent_actions.safetensors", "base"
FORMAT = 1
BLOCKS = ("inverse_dynamics_layers", "policy_layers")


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


def reference(source: str, folder: Path) -> str:
    """How a checkpoint in ``folder`` names its base: a hub id as it is, a neighbour in the same run relatively, else
    absolutely."""
    path = Path(source)
    if not path.exists():
        return source
    path, parent = path.resolve(), folder.resolve().parent
    return os.path.relpath(path, folder.resolve()) if path.is_relative_to(parent) else str(path)


def read_config(folder: Path) -> dict[str, Any]:
    """The saved description of a checkpoint.

    Raises:
        ValueError: it is missing, no JSON, or of another format.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
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
    settings = read_config(folder)["latent_actions"]
    if unknown := settings.keys() - {field.name for field in dataclasses.fields(LatentActionConfig)}:
        raise ValueError(f"{folder / CONFIG} has unknown settings: {', '.join(sorted(unknown))}")
    return LatentActionConfig(**settings)


def base_path(folder: str | Path) -> str:
    """Where the base LM (and its tokenizer) of a checkpoint lies: a folder or a hub id."""
    return beside(Path(folder), str(read_config(Path(folder))["base"]["path"]))


def beside(folder: Path, recorded: str) -> str:
    """What ``reference`` in a checkpoint in ``folder`` names."""
    path = folder / recorded
    return str(path.resolve()) if path.is_dir() else recorded


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


def load_policy(folder: str | Path, *, trust_remote_code: bool = False) -> LatentPolicy:
    """The latent policy of a checkpoint alone, without loading the base LM's weights.

    Raises:
        ValueError: the checkpoint is missing or damaged, or its policy's tensors are not all there.
    """
    folder = Path(folder)
    shape = read_shape(folder)
    base_config = load_config(base_path(folder), trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(base_config, trust_remote_code=trust_remote_code)
    policy = latent_policy(decoder_of(lm), shape)
    wanted = {f"policy.{name}": tuple(tensor.shape) for name, tensor in policy.state_dict().items()}
    require_tensors(folder, wanted, read_shapes(folder / WEIGHTS), "policy.")
    with safe_open(folder / WEIGHTS, framework="pt") as tensors:
        policy.load_state_dict({name: tensors.get_tensor(f"policy.{name}") for name in policy.state_dict()})
    return policy


class PretrainedMixin(nn.Module):
    """``from_base``, ``from_pretrained`` and ``save_pretrained`` for ``LatentActionLM``, a base LM and the modules
    beside it."""

    config: LatentActionConfig
    base: BaseLM
    policy: LatentPolicy
    inverse_dynamics: DecoderStack | None
    base_source: str | None
    """Folder or hub id of the base LM."""

    @classmethod
    def from_base(
        cls,
        base: str | Path | PreTrainedModel,
        *,
        dtype: str | torch.dtype = "auto",
        trust_remote_code: bool = False,
        seed: int | None = None,
        **shape: Any,
    ) -> Self:
        """New modules beside a frozen base LM (a folder, a hub id or a loaded model).

        Blocks that read ``late`` start as copies of the base's last blocks. ``seed`` makes the new weights reproducible
        without touching torch's global stream; ``shape`` are fields of ``LatentActionConfig``, of which ``None`` means
        the default: 2 blocks for inverse dynamics model and policy, or 1 where the base has 1. Nothing is drawn at
        random in its passes: no dropout, no noise of routers.

        Raises:
            ValueError: a setting is out of range, or there is no whole causal LM at ``base`` (as ``load_base``).
        """
        given = {name: value for name, value in shape.items() if value is not None}
        config = LatentActionConfig(**given)
        lm = load_base(base, dtype=dtype, trust_remote_code=trust_remote_code)
        depth = len(decoder_blocks(decoder_of(lm))[1])
        blocks = [name for name in BLOCKS if name == BLOCKS[0] or config.policy_kind == "blocks"]
        fitting = {name: min(depth, getattr(config, name)) for name in blocks if name not in given}
        config = dataclasses.replace(config, **fitting)
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            model = cls(lm, config)
        model.base_source = lm.name_or_path if isinstance(base, PreTrainedModel) else str(base)
        if isinstance(model.policy, DecoderStack) and config.policy_state == "late":
            model.policy.start_from(model.base.decoder)
        if config.inverse_dynamics_reads == "late" and model.inverse_dynamics is not None:
            model.inverse_dynamics.start_from(model.base.decoder)
        return model.eval()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        base: str | Path | PreTrainedModel | None = None,
        dtype: str | torch.dtype = "auto",
        trust_remote_code: bool = False,
    ) -> Self:
        """Load what ``save_pretrained`` wrote, or a published CoLA checkpoint (its config has ``num_code``).

        Args:
            base: where the base LM lies now, when it moved since saving; its hash must agree.
            dtype: of the base LM; the new modules stay in float32 (see ``cast_modules``).

        Raises:
            ValueError: no checkpoint in ``folder``, a tensor missing or misshapen, or the base's hash differs.
        """
        folder = Path(folder)
        if (folder / CONFIG).is_file():
            return cls._load_ours(folder, base, dtype, trust_remote_code)
        config = folder / "config.json"
        if config.is_file() and "num_code" in json.loads(config.read_text()):
            published = read_published(folder, dtype)
            return cls(published.lm, published.config)._fill(published.modules, folder)
        raise ValueError(
            f"no latent-action checkpoint in {str(folder)!r}: neither {CONFIG} nor a config.json with num_code is there"
        )

    def hosted(self, policy_dtype: torch.dtype = torch.float32) -> Self:
        """As rollout workers and exports host it (in another precision another rounding writes other tokens): without
        its inverse dynamics model, the world model in the base's dtype, the policy in ``policy_dtype``."""
        self.inverse_dynamics = None
        self.cast_modules().policy.to(policy_dtype)
        return self

    @classmethod
    def _load_ours(
        cls,
        folder: Path,
        base: str | Path | PreTrainedModel | None,
        dtype: str | torch.dtype,
        trust_remote_code: bool,
    ) -> Self:
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
        return model._fill(read_weights(folder / WEIGHTS), folder)

    def _fill(self, tensors: dict[str, torch.Tensor], folder: Path) -> Self:
        """Load the new modules' tensors; every one must be there and fit."""
        wanted, found = ({name: tuple(t.shape) for name, t in some.items()} for some in (self.new_modules(), tensors))
        require_tensors(folder, wanted, found)
        self.load_state_dict(tensors, strict=False)
        return self.eval()

    def save_pretrained(self, folder: str | Path, *, bundle_base: bool = False, inverse_dynamics: bool = True) -> Path:
        """Save the new modules (safetensors + JSON); the base by reference with its hash, or bundled.

        ``inverse_dynamics=False`` leaves the inverse dynamics model out (production).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        keep = {
            k: v.contiguous()
            for k, v in self.new_modules().items()
            if inverse_dynamics or not k.startswith("inverse_dynamics.")
        }
        if bundle_base:
            self.base.lm.save_pretrained(folder / BASE)
        elif not self.base_source:
            raise ValueError(
                "the base LM was handed over as a loaded model without a folder: save with bundle_base=True"
            )
        source = BASE if bundle_base else reference(str(self.base_source), folder)
        config = {
            "format": FORMAT,
            "latent_actions": dataclasses.asdict(self.config),
            "inverse_dynamics": inverse_dynamics and self.inverse_dynamics is not None,
            "base": {"path": source, "bundled": bundle_base, "sha256": base_hash(self), "dtype": str(self.base.dtype)},
        }
        save_file(keep, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(config, indent=1))
        as_readable_as(folder / CONFIG)
        return folder

    def new_modules(self) -> dict[str, torch.Tensor]:
        """Every tensor beside the base LM, by name."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("base.")}


def world_hash(model: PretrainedMixin) -> str:
    """Hash of what turns a code into a token besides the base: codebook and merge module."""
    return world_hash_of(model.new_modules())


def world_hash_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """``world_hash`` of a checkpoint's tensors."""
    return weights_hash((name, tensor) for name, tensor in tensors.items() if name.startswith(("codebook", "merge")))


def base_hash(model: PretrainedMixin) -> str:
    """Hash of the base LM's weights."""
    return weights_hash(model.base.lm.named_parameters())
