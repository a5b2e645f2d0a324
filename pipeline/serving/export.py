"""``export``: a policy with all it needs for inference, without training state. Safetensors and JSON only.

The folder is a checkpoint like any other (``evaluate`` and ``search`` take it) without the inverse dynamics model, and
a model that ``AutoModelForCausalLM`` loads: with tokenizer, generation defaults and ``provenance.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from configs.loading import load_config
from configs.redaction import without_secrets
from configs.schema import Decoding, RunConfig
from latent_control.auto import LatentControlConfig
from latent_control.auto_generation import greedy_defaults
from latent_control.bases.foreign_code import BASE_KEY, is_foreign
from latent_control.model import LatentActionLM
from latent_control.pretrained import BASE, base_hash, read_config, tokenizer_path, world_hash
from latent_control.pretrained import CONFIG as LATENT
from latent_control.text import load_tokenizer
from pipeline.runs import manifest
from pipeline.runs.environment import git_commit
from pipeline.runs.layout import CONFIG as RUN_CONFIG
from pipeline.runs.layout import TOKEN_INFO
from pipeline.runs.policies import checkpoint_of
from pipeline.runs.stage_table import ACTIONS, POLICY_STAGES
from pipeline.runs.summary import read_summary
from pipeline.serving.model_card import CARD, model_card
from pipeline.storage import checkpoints
from pipeline.storage.atomic import sha256_file
from pipeline.tracking.lineage import replay_hash

PROVENANCE, FORMAT = "provenance.json", 1


@dataclass(frozen=True, kw_only=True)
class Source:
    """The source of an export: ``Source(checkpoint=Path("runs/first/checkpoints/improve"),
    run_dir=Path("runs/first"))``."""

    checkpoint: Path
    run_dir: Path | None
    """``None``: a checkpoint outside of a run."""

    def config(self) -> RunConfig | None:
        """The run's config."""
        return None if self.run_dir is None else load_config(self.run_dir / RUN_CONFIG, [], check_paths=False)

    def load(self, config: RunConfig | None, base: str | Path | None) -> tuple[LatentActionLM, PreTrainedTokenizerBase]:
        """Model and tokenizer by the settings of ``config``, where there is one; ``base``: where the base LM lies, when
        it moved."""
        trust = config is not None and config.base.trust_remote_code
        dtype = "auto" if config is None else config.base.dtype
        model = LatentActionLM.from_pretrained(self.checkpoint, base=base, dtype=dtype, trust_remote_code=trust)
        return model, load_tokenizer(base or tokenizer_path(self.checkpoint), trust_remote_code=trust)


def find(target: Path) -> Source:
    """The last policy of a run, or one checkpoint.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: there is no policy over codes, or it is damaged.
    """
    if not target.exists():
        raise FileNotFoundError(
            f"there is nothing at {target}; give a run folder or a checkpoint (RUN/checkpoints/STAGE)"
        )
    if (target / LATENT).is_file() and not (target.parent.parent / RUN_CONFIG).is_file():
        source = Source(checkpoint=target, run_dir=None)
    else:
        checkpoint, run_dir = checkpoint_of(target)
        source = Source(checkpoint=checkpoint, run_dir=run_dir)
    folder = source.checkpoint
    if not (folder / LATENT).is_file():
        if (folder / TOKEN_INFO).is_file():
            raise ValueError(
                f"{folder} is a policy over tokens: it has no codes to serve; export a run with improve.level: latent"
            )
        raise ValueError(
            f"{folder} is not a latent-action checkpoint: it has no {LATENT}; give a run folder or "
            "RUN/checkpoints/STAGE"
        )
    if damaged := weight_problems(folder):
        raise ValueError(f"{folder} is damaged ({damaged[0]}); take another checkpoint, or train that stage again")
    if (stage := _info(folder).get("stage")) == ACTIONS:
        raise ValueError(
            f"the policy in {folder} is untrained: stage {stage} only finds codes; export one of "
            f"{', '.join(POLICY_STAGES)}"
        )
    return source


def weight_problems(folder: Path) -> list[str]:
    """What is wrong with the weights of a folder that has a manifest; its JSON may have been edited, e.g. generation
    defaults."""
    if not (folder / checkpoints.MANIFEST).is_file():
        return []
    return [
        line
        for line in checkpoints.verify(folder)
        if ".safetensors" in line or checkpoints.MANIFEST in line.partition(" ")[0]
    ]


def export(source: Source, out: Path, *, base: str | None = None, reference: bool = False) -> Path:
    """Write the export folder ``out`` (whole or not at all) and return it.

    Args:
        base: where the base LM lies, when it moved since training.
        reference: do not copy the base LM, keep its place and hash.

    Raises:
        ValueError: ``out`` holds something, or the base LM is not there, is another, or needs code of its own, which
            neither the service nor MLflow's model runs.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; give another folder with -o, or remove it")
    config = source.config()
    latent, tokenizer = source.load(config, base)
    if any(is_foreign(part) for part in (latent.base.lm, latent.base.lm.config, tokenizer)):
        raise ValueError(
            f"the base LM {latent.base_source} needs Python code of its own ({BASE_KEY}: true), which neither the "
            "service nor MLflow's model runs, so it is not exported; use the policy in Python (open_run(RUN).model()), "
            "or train one on a base whose architecture transformers knows"
        )
    about = provenance(source, latent, config)

    def files(staging: Path) -> None:
        latent.save_pretrained(staging, bundle_base=not reference, inverse_dynamics=False)
        LatentControlConfig.of(latent).save_pretrained(staging)
        limits = () if config is None else (config.rollout.max_new_tokens, config.rollout.stop)
        decoding = Decoding() if config is None else config.decoding
        chosen: dict[str, Any] = {
            "decode": decoding.decode,
            "mixture_codes": decoding.mixture_codes or latent.config.num_actions,
        }
        greedy_defaults(latent.base.lm, *limits, **chosen).save_pretrained(staging)
        for folder in (staging, *([] if reference else [staging / BASE])):
            tokenizer.save_pretrained(folder, save_jinja_files=False)
        (staging / PROVENANCE).write_text(json.dumps(about, indent=1) + "\n")
        (staging / CARD).write_text(model_card(about, str(base or latent.base_source), latent.config), encoding="utf-8")

    checkpoints.write(out, files=files, info={"stage": "export"})
    if source.run_dir is not None:
        manifest.know_own(source.run_dir, out / checkpoints.MANIFEST)
    return out


def provenance(source: Source, latent: LatentActionLM, config: RunConfig | None) -> dict[str, Any]:
    """Where a policy comes from: run, checkpoint, hashes, config and what its evaluation found."""
    sealed = source.checkpoint / checkpoints.MANIFEST
    return {
        "format": FORMAT,
        "run": None if source.run_dir is None else source.run_dir.name,
        "checkpoint": source.checkpoint.name,
        "checkpoint_manifest_sha256": sha256_file(sealed) if sealed.is_file() else None,
        "base": {"name": Path(str(latent.base_source)).name, "sha256": base_hash(latent)},
        "world_hash": world_hash(latent),
        "replay_sha256": None if source.run_dir is None else replay_hash(source.run_dir) or None,
        "trained_with": _versions(source.checkpoint),
        "exported_by": git_commit(),
        "evaluation": None if source.run_dir is None else read_summary(source.run_dir).get("evaluation"),
        "config": None if config is None else json.loads(without_secrets(config.model_dump_json())),
    }


def is_export(folder: Path) -> bool:
    """Whether ``export`` wrote ``folder``."""
    return (folder / PROVENANCE).is_file() and (folder / LATENT).is_file()


def read_provenance(folder: Path) -> dict[str, Any]:
    """``provenance.json`` of an export; empty for other folders."""
    return json.loads((folder / PROVENANCE).read_text()) if (folder / PROVENANCE).is_file() else {}


def base_inside(folder: Path) -> bool:
    """Whether a checkpoint carries its base LM."""
    return bool(read_config(folder)["base"]["bundled"])


def defaults(folder: Path) -> GenerationConfig:
    """Generation defaults of an export."""
    return GenerationConfig.from_pretrained(folder)


def _info(folder: Path) -> Mapping[str, Any]:
    return checkpoints.read_info(folder) if (folder / checkpoints.MANIFEST).is_file() else {}


def _versions(folder: Path) -> Mapping[str, str]:
    path = folder / checkpoints.MANIFEST
    return json.loads(path.read_text())["versions"] if path.is_file() else {}
