"""A model for production: base LM, policy, merge module and codebook in one folder, without the inverse dynamics model."""

from __future__ import annotations

import hashlib
import json
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from configs.loading import load_config
from configs.schema import RunConfig
from pipeline import checkpoints
from pipeline.off_policy import RUN_CONFIG, checkpoint_of

PROVENANCE = "provenance.json"


def export(target: Path, folder: Path) -> dict[str, Any]:
    """Write the last policy of a run (or the checkpoint ``target`` inside one) to ``folder``, whole or not at all; returns its provenance.

    Loads with ``AutoModelForCausalLM`` (after ``import latent_control``), ``LatentActionLM.from_pretrained`` and ``TextModel.load``.

    Raises:
        ValueError: no such policy, a damaged checkpoint, or another base LM than it was trained on.
    """
    from transformers import AutoTokenizer

    from latent_control import LatentActionForCausalLM, LatentActionLM
    from latent_control.persistence import CONFIG, base_hash, base_path, world_hash
    from latent_control.text import SETTINGS

    checkpoint, run_dir = checkpoint_of(target)
    if not (checkpoint / CONFIG).is_file():
        raise ValueError(f"{checkpoint} is no latent-action checkpoint (it has no {CONFIG}): token-level policies are not exported")
    if problems := checkpoints.verify(checkpoint):
        raise ValueError(f"{checkpoint} is damaged: {'; '.join(problems)}; export another checkpoint")
    config = load_config(run_dir / RUN_CONFIG, [], check_paths=False)
    trust = config.base.trust_remote_code
    model = LatentActionLM.from_pretrained(checkpoint, trust_remote_code=trust)
    tokenizer = AutoTokenizer.from_pretrained(base_path(checkpoint), trust_remote_code=trust)
    info = provenance(config, run_dir, checkpoint) | {"base_sha256": base_hash(model), "world_sha256": world_hash(model)}

    def files(staging: Path) -> None:
        LatentActionForCausalLM.of(model).save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        (staging / SETTINGS).write_text(json.dumps(serving(config), indent=1), encoding="utf-8")
        (staging / PROVENANCE).write_text(json.dumps(info, indent=1), encoding="utf-8")

    checkpoints.write(folder, files=files, info=info)
    return info


def serving(config: RunConfig) -> dict[str, Any]:
    """What a request leaves open."""
    return {"chat": config.task.chat, "max_new_tokens": config.rollout.max_new_tokens, "temperature": config.rollout.temperature}


def provenance(config: RunConfig, run_dir: Path, checkpoint: Path) -> dict[str, Any]:
    """Where an export comes from: run, stage, code, config and weights by hash, and how it was judged."""
    from pipeline.tracking import git_commit, read_record

    summary = json.loads((run_dir / "summary.json").read_text()) if (run_dir / "summary.json").is_file() else {}
    record = read_record(run_dir) or {"runs": {}}
    return {
        "run": run_dir.name,
        "stage": checkpoint.name,
        "seed": config.seed,
        "git_commit": git_commit(),
        "config_sha256": hashlib.sha256((run_dir / RUN_CONFIG).read_bytes()).hexdigest(),
        "checkpoint_seal": json.loads((checkpoint / checkpoints.MANIFEST).read_text())["seal_sha256"],
        "mlflow_run_id": record["runs"].get(checkpoint.name),
        "evaluation": summary.get("evaluation"),
        "gates": summary.get("gates"),
    }


def registered(folder: Path, run_dir: Path, name: str, alias: str | None, uri: str | None) -> dict[str, str]:
    """Register the export in ``folder`` under ``name`` in the run's store, or in the one at ``uri``; see ``tracking.register``."""
    from pipeline.tracking import read_record, register, tracking_uri

    config = load_config(run_dir / RUN_CONFIG, [], check_paths=False)
    stage = json.loads((folder / PROVENANCE).read_text())["stage"]
    # A run id means something in the store it comes from only.
    runs = {} if uri else (read_record(run_dir) or {"runs": {}})["runs"]
    store = tracking_uri(uri or config.tracking.uri, run_dir)
    return register(folder, name, alias, uri=store, experiment=config.tracking.experiment, run_id=runs.get(stage))


def require_serve() -> None:
    """``ValueError`` unless Ray Serve's packages are here."""
    if missing := [name for name in ("fastapi", "grpc_reflection", "uvicorn") if find_spec(name) is None]:
        raise ValueError(f"serving needs {', '.join(missing)}: pip install -c requirements.lock -e '.[serve]'")


def require_free(host: str, port: int) -> None:
    """``ValueError`` unless ``host:port`` can be listened at."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {error.strerror}; give another port, e.g. --port {port % 65535 + 1}") from error


def require_whole(folder: Path) -> None:
    """``ValueError`` unless ``folder`` holds an undamaged export."""
    if not (folder / PROVENANCE).is_file():
        raise ValueError(f"{folder} is neither a run nor an export: make one with latent-control export RUN --out {folder}")
    if problems := checkpoints.verify(folder):
        raise ValueError(f"{folder} is damaged: {'; '.join(problems)}; export it again")
