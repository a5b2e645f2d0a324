"""The base LM before a run: its config, tokenizer and files, without its weights."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from configs.schema import RunConfig
from pipeline.preflight.problems import placed
from pipeline.runs.errors import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

DECODERS = "only decoder-only language models are supported"


class Unreachable(Exception):
    """The model is neither on this machine nor available from the hub now."""


def base_config_and_tokenizer(config: RunConfig) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Config and tokenizer of the base LM, without its weights; the local copy first, then the hub.

    Raises:
        Unreachable: a hub id that is not cached, and the hub does not answer.
        ValueError: the files are not a language model.
    """
    from latent_control.bases.adapters import sources_of
    from latent_control.bases.foreign_code import NeedsCode
    from latent_control.bases.loading import load_config
    from latent_control.text import load_tokenizer

    folder, tokenizer_folder = sources_of(config.base.model)
    trust = config.base.trust_remote_code
    for local_only in (True, False):
        if not local_only and not _hub_answers():
            raise Unreachable(
                f"{config.base.model} is neither a folder nor cached here, and the hub does not answer; download it "
                "first, or give a folder"
            )
        try:
            return (
                load_config(folder, trust_remote_code=trust, local_files_only=local_only),
                load_tokenizer(tokenizer_folder, trust_remote_code=trust, local_files_only=local_only),
            )
        except NeedsCode:
            raise
        except (OSError, ValueError, KeyError) as error:
            if Path(folder).is_dir():
                raise ValueError(
                    f"{folder} is not a language model with a tokenizer: {first_line(error)} Copy the whole folder "
                    "again: config.json, the weights, tokenizer.json and tokenizer_config.json"
                ) from error
            if not local_only:
                raise Unreachable(
                    f"{config.base.model} is neither a folder, nor cached, nor available from the hub: "
                    f"{first_line(error)}"
                ) from error
    raise AssertionError("one of the two tries returns or raises")


def _hub_answers() -> bool:
    """One request with a short timeout: transformers would retry for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(constants.ENDPOINT, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def file_problems(config: RunConfig, warnings: list[str]) -> Iterator[str]:
    """Incomplete weight files of the base LM, its adapter or the text encoder; no weight is read."""
    from latent_control.bases import adapters
    from latent_control.bases.loading import BASE, examine

    model, trust = config.base.model, config.base.trust_remote_code
    try:
        if adapter := adapters.adapter_folder(model):
            problems, unjudged = adapters.adapter_problems(adapter, trust_remote_code=trust)
        else:
            problems, unjudged, _ = examine(adapters.sources_of(model)[0], BASE, trust_remote_code=trust)
    except ValueError as error:
        yield placed("base.model", error)
        return
    yield from (f"base.model: {problem}" for problem in problems)
    if unjudged:
        warnings.append(f"base.model: {unjudged}")
    if config.evaluation is not None and config.evaluation.embedder is not None:
        yield from _embedder_problems(config.evaluation.embedder)


def _embedder_problems(embedder: str) -> Iterator[str]:
    from latent_control.bases.loading import ENCODER, examine

    try:
        found = examine(embedder, ENCODER, trust_remote_code=False, key=None)
    except ValueError as error:
        yield placed("evaluation.embedder", error)
        return
    yield from (f"evaluation.embedder: {problem}" for problem in found.problems)


def shape_problems(config: RunConfig, model: PreTrainedConfig) -> Iterator[str]:
    """Requested blocks and heads that the base LM does not have."""
    text = model.get_text_config()
    depth, width, heads = (
        getattr(text, name, None) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    if depth is None or width is None:
        yield (
            f"base.model: {config.base.model} ({model.model_type}) names no num_hidden_layers and hidden_size; "
            f"{DECODERS}"
        )
        return
    if getattr(model, "is_encoder_decoder", False):
        yield f"base.model: {config.base.model} ({model.model_type}) is an encoder-decoder; {DECODERS}"
    if heads and not getattr(text, "head_dim", None) and width % heads:
        yield f"base.model: hidden_size {width} does not divide into {heads} attention heads"
    for name, blocks, late in _block_counts(config):
        if late and blocks is not None and blocks > depth:
            yield f"{name}: {blocks} blocks that read late, but the base LM has {depth}; set at most {depth}"


def _block_counts(config: RunConfig) -> Iterator[tuple[str, int | None, bool]]:
    """Key, number of blocks, and whether they must be the base's last ones."""
    actions, improve = config.actions, config.improve
    if actions is not None:
        yield (
            "actions.inverse_dynamics_layers",
            actions.inverse_dynamics_layers,
            actions.inverse_dynamics_reads == "late",
        )
        late = actions.policy_kind == "blocks" and actions.policy_reads != "final"
        yield "actions.policy_layers", actions.policy_layers, late
    if improve is not None and improve.token_blocks is not None:
        late = improve.token_trains in ("last_blocks", "lora", "steering")
        yield "improve.token_blocks", improve.token_blocks, late


def tuned_start(config: RunConfig) -> list[str]:
    """A warning where the token level would start from a base LM that another run may have changed under codes."""
    from latent_control.pretrained import CONFIG, base_path

    if not config.over_tokens or config.actions is None or config.actions.init is None:
        return []
    folder = Path(config.actions.init)
    published = (folder / "config.json").is_file() and not (folder / CONFIG).is_file()
    try:
        inside = published or (Path(base_path(folder)).parent / CONFIG).is_file()
    except ValueError:
        return []  # said elsewhere
    if not inside:
        return []
    return [
        f"actions.init: the base LM of {folder} lies in a checkpoint: if finetune tuned it under codes, the "
        "token level, which has none, does not start alike. Set actions.init to the checkpoint before the tuning "
        "(RUN/checkpoints/clone) and put its finetune section into this config: then the token level starts from the "
        "same updates without codes"
    ]
