"""An export in MLflow's model registry: models from code, with signature, version and alias. It contains no pickle."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import latent_control
from configs.redaction import without_secrets
from latent_control.pretrained import base_path
from pipeline.serving import bank as banks
from pipeline.serving.export import base_inside, read_provenance, weight_problems
from pipeline.tracking.mlflow_store import MlflowStore, quiet_mlflow

CODE = Path(__file__).with_name("mlflow_model.py")
# What the model needs where it is loaded; latent_control itself travels along.
PACKAGES = ("mlflow", "numpy", "pandas", "safetensors", "torch", "transformers")


@dataclass(frozen=True, kw_only=True)
class Registered:
    """``Registered(name="countdown", version="3", uri="models:/countdown/3", alias="champion",
    store="sqlite:////.../mlflow.db")``."""

    name: str
    version: str
    uri: str
    alias: str | None
    store: str


def register(folder: Path, name: str, *, store: str, experiment: str, alias: str | None = None) -> Registered:
    """Log the export ``folder`` as a new version of model ``name`` in ``store`` (a tracking URI), and point ``alias``
    at it.

    Raises: ValueError: the export's weights are not as they were written, its base LM is a folder outside of it, it
        cannot answer a prompt, or the store refuses.
    """
    require_names(name, alias)
    if damaged := weight_problems(folder):
        raise ValueError(f"{folder} is damaged ({damaged[0]}): export it again")
    if not base_inside(folder) and Path(base_path(folder)).exists():
        raise ValueError(
            f"{folder} refers to a base LM at {base_path(folder)}, which other machines lack: export "
            "without --reference-base"
        )
    logged = VersionContent(folder=folder, artifacts={"export": str(folder)}, tags={"stage": "export"} | _tags(folder))
    return _register(logged, name, store=store, experiment=experiment, alias=alias)


def register_member(
    bank: Path, member: str, name: str, *, store: str, experiment: str, alias: str | None = None
) -> Registered:
    """As ``register``, of ``NAME@VERSION`` of a bank: its own few megabytes alone. It names the bank's world by its
    hash, and is loaded with that: ``mlflow.pyfunc.load_model(uri, model_config={"world": "BANK/world"})``.

    Raises:
        ValueError: there is no such member, or the store refuses.
    """
    require_names(name, alias)
    record, world = banks.read_record(bank, member), bank / banks.WORLD
    tags = {f"bank_{key}": str(record[key]) for key in ("world_hash", "base_sha256")} | {
        key: str(record[key]) for key in ("sha256", "parent", "run", "checkpoint") if record[key]
    }
    with tempfile.TemporaryDirectory() as folder:
        for ending in ("safetensors", "json"):
            shutil.copyfile(banks.file_of(bank, member, ending), Path(folder) / f"member.{ending}")
        logged = VersionContent(
            folder=bank,
            artifacts={"member": folder},
            tags={"stage": "bank", "member": member} | tags,
            model_config={"world": str(world.absolute())},
        )
        return _register(logged, name, store=store, experiment=experiment, alias=alias)


@dataclass(frozen=True, kw_only=True)
class VersionContent:
    """What becomes a version of a model."""

    folder: Path
    """What its MLflow run is about"""
    artifacts: dict[str, str]
    tags: dict[str, str]
    model_config: dict[str, str] | None = None


def _register(logged: VersionContent, name: str, *, store: str, experiment: str, alias: str | None) -> Registered:
    quiet_mlflow()
    import mlflow
    from mlflow.exceptions import MlflowException

    from pipeline.serving.mlflow_model import LatentModel

    answering = LatentModel()  # what does not answer here would not where it is loaded
    answering.load_context(SimpleNamespace(artifacts=logged.artifacts, model_config=logged.model_config))
    answering.predict(None, {"prompt": ["1"]}, {"max_tokens": 1})
    try:
        with _pointed_at(mlflow, store):
            place = MlflowStore(store, experiment, logged.folder)
            place.open()
            version = _log(mlflow, logged, name, place.experiment_id)
            client = mlflow.MlflowClient(tracking_uri=store, registry_uri=store)
            for key, value in logged.tags.items():
                client.set_model_version_tag(name, version, key, value)
            if alias is not None:
                client.set_registered_model_alias(name, alias, version)
    except MlflowException as error:
        raise ValueError(
            without_secrets(f"{store} did not take the model {name!r}: {str(error).partition(chr(10))[0][:300]}")
        ) from error
    return Registered(
        name=name, version=version, uri=f"models:/{name}/{version}", alias=alias, store=without_secrets(store)
    )


def require_names(name: str, alias: str | None) -> None:
    """``ValueError`` for a model's name or alias that MLflow refuses, which it does once the version is made."""
    if not name.strip() or {"/", ":"} & {*name} or name in (".", ".."):
        raise ValueError(f"--register: {name!r} is not a name of a model: leave out / and :")
    if alias is not None and not re.fullmatch(r"(?!latest$|v\d+$)[\w-]{1,255}", alias, re.ASCII | re.IGNORECASE):
        raise ValueError(
            f"--alias: {alias!r} is not an alias: take letters, digits, _ and -, but not 'latest' or v1, which MLflow "
            "keeps for itself"
        )


@contextmanager
def _pointed_at(mlflow: Any, store: str) -> Iterator[None]:
    """MLflow's global stores are ``store`` for the length of a block; they live in the environment, too, for child
    processes."""
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
    before = {name: os.environ.get(name) for name in names}
    mlflow.set_tracking_uri(store)
    mlflow.set_registry_uri(store)
    try:
        yield
    finally:
        mlflow.set_registry_uri("")
        mlflow.set_tracking_uri(before[names[0]])
        for name in names:
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _log(mlflow: Any, logged: VersionContent, name: str, experiment_id: str) -> str:
    """The new version's number."""
    os.environ["MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK"] = "true"  # they are given below
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    title = f"{logged.tags['stage']}/{name}"
    with mlflow.start_run(experiment_id=experiment_id, run_name=title, tags=logged.tags), warnings.catch_warnings():
        # it asks for an example, from which it would find out the signature given here
        warnings.simplefilter("ignore", UserWarning)
        made = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(CODE),
            artifacts=logged.artifacts,
            model_config=logged.model_config,
            code_paths=[str(Path(latent_control.__file__).parent)],
            pip_requirements=[f"{package}=={metadata.version(package).partition('+')[0]}" for package in PACKAGES],
            signature=signature(),
            registered_model_name=name,
        )
    return str(made.registered_model_version)


def signature() -> Any:
    """Columns in and out, and the parameters with their defaults (0 tokens, decode "": the export's own default;
    seed -1: none)."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "prompt"), ColSpec(Array(DataType.long), "codes", required=False)]),
        outputs=Schema(
            [
                ColSpec(DataType.string, "text"),
                ColSpec(Array(DataType.long), "codes"),
                ColSpec(DataType.string, "finish_reason"),
            ]
        ),
        params=ParamSchema(
            [
                ParamSpec("max_tokens", DataType.long, 0),
                ParamSpec("temperature", DataType.double, 0.0),
                ParamSpec("seed", DataType.long, -1),
                ParamSpec("decode", DataType.string, ""),
                ParamSpec("allowed_codes", DataType.long, [], shape=(-1,)),
            ]
        ),
    )


def _tags(folder: Path) -> dict[str, str]:
    """What a version is, in a few words; the rest is in the export's provenance."""
    about = read_provenance(folder)
    wanted = ("run", "checkpoint", "world_hash", "exported_by")
    hashes = {"checkpoint_hash": "checkpoint_manifest_sha256", "replay_hash": "replay_sha256"}
    tags = {name: about.get(name) for name in wanted} | {name: about.get(key) for name, key in hashes.items()}
    tags["base_hash"] = (about.get("base") or {}).get("sha256")
    return {name: str(value) for name, value in tags.items() if value}
