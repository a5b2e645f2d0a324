"""Code in a model's folder: not run, and not asked about, by any loader, even where a ``y`` lies on standard input."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("configs", "latent_control", "rollout_workers", "learners", "pipeline")
pytest_plugins = ("rl_fixtures",)
RAN = "ran"
"""The file that foreign code makes."""
OWN_CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("foreign code ran")
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel
from transformers import PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnLM(LlamaForCausalLM):
    config_class = OwnConfig
class OwnScorer(LlamaForSequenceClassification):
    config_class = OwnConfig
class OwnModel(LlamaModel):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""

# Every way in which a model, a tokenizer or a config is loaded; each with the folder that has code of its own.
LOADERS = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
import torch

home = Path(sys.argv[1])
names = ("model", "words", "adapter", "checkpoint", "export")
model, words, adapter, checkpoint, export = (str(home / name) for name in names)
lm_export = str(home / "export-of-own-base")

def refusal(load):
    try:
        load()
    except (ValueError, OSError) as error:
        return str(error)
    return None

def host(level, folder):
    from rollout_workers.rollouts import HostSpec
    from rollout_workers.model_host import load_host
    load_host(HostSpec(level=level, checkpoint=folder), torch.device("cpu"), torch.float32)

def simulated(level, folder):
    from configs.schema import RolloutConfig
    from rollout_workers.engines.simulated import SimulatedEngine
    from rollout_workers.rollouts import HostSpec
    SimulatedEngine.load(HostSpec(level=level, checkpoint=folder), RolloutConfig())

def config_check(**sections):
    from configs.schema import RunConfig
    from pipeline.preflight.check import check
    raise ValueError("; ".join(check(RunConfig(**sections)).errors))

def reward(folder):
    from rollout_workers.judges.reward_models import RewardModel
    from rollout_workers.tasks.scorer_options import Preference
    RewardModel(Preference(model=folder))

def reward_train(folder):
    from latent_control.preference import Reading
    from learners.reward_model import RewardTraining, train_reward_model
    train_reward_model(folder, [], [], RewardTraining(updates=1), Reading(), print)

def exported(folder):
    from pipeline.serving import export
    export.export(export.find(Path(folder)), home / "out")

def mlflow_model(folder):
    from pipeline.serving.mlflow_model import LatentModel
    LatentModel().load_context(SimpleNamespace(artifacts={"export": folder}))

def served(folder):
    from pipeline.serving.service import Service
    Service(Path(folder), "own")

def steered(folder):
    from pipeline.steering.loading import load
    load(Path(folder))

def explored(folder):
    from configs.schema import RunConfig
    from pipeline.pages.explorer.policies import load_models
    load_models(Path(folder), Path(folder), RunConfig(base={"model": folder}), None)

def auto(folder):
    from transformers import AutoModelForCausalLM
    import latent_control
    AutoModelForCausalLM.from_pretrained(folder)

from latent_control import LatentActionLM
from latent_control.bases.adapters import merged_folder
from latent_control.base_lm import load_base
from latent_control.pretrained import load_policy
from latent_control.preference import load_classifier, require_reward_model
from latent_control.text import load_tokenizer
from learners.rl_module import build_policy
from pipeline.stages.embedding import embed

token = dict(level="token", token_trains="all", token_blocks=1, trust_remote_code=False)
loads = {
    "load_base": (model, lambda: load_base(model)),
    "from_base": (model, lambda: LatentActionLM.from_base(model)),
    "tokenizer": (words, lambda: load_tokenizer(words)),
    "config check": (model, lambda: config_check(base={"model": model})),
    "config check, tokenizer": (words, lambda: config_check(base={"model": words})),
    "config check, adapter": (model, lambda: config_check(base={"model": adapter})),
    "adapter": (model, lambda: merged_folder(adapter)),
    "checkpoint": (model, lambda: LatentActionLM.from_pretrained(checkpoint)),
    "policy": (model, lambda: load_policy(checkpoint)),
    "rollout worker": (model, lambda: host("base", model)),
    "rollout worker, checkpoint": (model, lambda: host("latent", checkpoint)),
    "simulated engine": (model, lambda: simulated("base", model)),
    "simulated engine, checkpoint": (model, lambda: simulated("latent", checkpoint)),
    "learner": (model, lambda: build_policy(checkpoint=model, **token)),
    "reward model, config": (model, lambda: require_reward_model(model)),
    "reward model": (model, lambda: load_classifier(model)),
    "reward model, tokenizer": (words, lambda: load_classifier(words, new_head=True)),
    "reward worker": (model, lambda: reward(model)),
    "reward train": (model, lambda: reward_train(model)),
    "reward train, tokenizer": (words, lambda: reward_train(words)),
    "encoder": (model, lambda: embed(["1"], model)),
    "encoder, tokenizer": (words, lambda: embed(["1"], words)),
    "export": (model, lambda: exported(checkpoint)),
    "steer": (model, lambda: steered(checkpoint)),
    "steer, tokenizer": (export, lambda: steered(export)),
    "explorer": (model, lambda: explored(checkpoint)),
    "served tokenizer": (export, lambda: served(export)),
    "served base": (lm_export + "/base", lambda: served(lm_export)),
    "mlflow": (export, lambda: mlflow_model(export)),
    "mlflow, base": (lm_export + "/base", lambda: mlflow_model(lm_export)),
    "transformers, base": (lm_export + "/base", lambda: auto(lm_export)),
}
said = {name: (folder, refusal(load)) for name, (folder, load) in loads.items()}
ran = (home / "ran").exists()
# Else all of this would pass with code that cannot run anyway.
allowed = [type(load(model, trust_remote_code=True)).__name__ for load in (load_base, load_tokenizer)]
when_allowed = (home / "ran").exists()
found = {"said": said, "ran": ran, "allowed": allowed, "ran_when_allowed": when_allowed}
(home / "said.json").write_text(json.dumps(found))
"""


def owns_model(folder: Path, marker: Path) -> Path:
    """Make the model in ``folder`` one that only its own code can build."""
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnLM", "AutoModel": "OwnModel"}
    classes |= {"AutoModelForSequenceClassification": "OwnScorer"}
    config |= {"model_type": "own", "auto_map": {auto: f"own.{name}" for auto, name in classes.items()}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(OWN_CODE.format(marker=str(marker)))
    return owns_tokenizer(folder, marker)


def owns_tokenizer(folder: Path, marker: Path) -> Path:
    """The same for the tokenizer."""
    path = folder / "tokenizer_config.json"
    said = json.loads(path.read_text()) | {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
    }
    path.write_text(json.dumps(said))
    (folder / "own.py").write_text(OWN_CODE.format(marker=str(marker)))
    return folder


@pytest.fixture(scope="module")
def home(tiny_base: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of every kind with code that makes the file ``ran``."""
    from pipeline.serving import export

    home = tmp_path_factory.mktemp("foreign")
    marker = home / RAN
    export.export(export.find(tiny_checkpoint), home / "export")
    shutil.copytree(home / "export", home / "export-of-own-base")
    owns_tokenizer(home / "export", marker)
    owns_model(home / "export-of-own-base" / "base", marker)
    owns_model(shutil.copytree(tiny_base, home / "model"), marker)
    owns_tokenizer(shutil.copytree(tiny_base, home / "words"), marker)
    shutil.copytree(tiny_checkpoint, home / "checkpoint")
    said = json.loads((home / "checkpoint" / "latent_action_config.json").read_text())
    said["base"]["path"] = str(home / "model")
    (home / "checkpoint" / "latent_action_config.json").write_text(json.dumps(said))
    (home / "adapter").mkdir()
    adapter = {
        "base_model_name_or_path": str(home / "model"),
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["q_proj"],
    }
    (home / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    save_file(
        {"x": next(iter(load_file(tiny_base / "model.safetensors").values()))},
        home / "adapter" / "adapter_model.safetensors",
    )
    return home


def run_loaders(home: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, with a thousand ``y`` on standard input."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(home / "cache"),
        "HF_MODULES_CACHE": str(home / "modules"),
    }
    command = [sys.executable, "-c", LOADERS, str(home)]
    return subprocess.run(
        command, input="y\n" * 1000, text=True, capture_output=True, timeout=300, env=environment, cwd=home, check=False
    )


def test_no_loader_runs_code_of_a_folder_or_asks(home: Path) -> None:
    pytest.importorskip("peft", reason="the extra 'lora' is not installed")
    done = run_loaders(home)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((home / "said.json").read_text())
    assert not result["ran"] and "[y/N]" not in done.stdout + done.stderr
    assert result["allowed"] == ["OwnLM", "OwnTokenizer"] and result["ran_when_allowed"]
    said: dict[str, tuple[str, str | None]] = result["said"]
    assert len(said) == 31
    wrong = {
        name: error
        for name, (folder, error) in said.items()
        if error is None
        or folder not in error
        or "needs Python code of its own (auto_map), which is not run" not in error
    }
    assert not wrong
    for name in ("load_base", "from_base", "config check", "adapter", "checkpoint"):
        assert "set base.trust_remote_code: true" in str(said[name][1]), name
    for name in ("reward model", "encoder", "served tokenizer", "mlflow"):
        assert "base.trust_remote_code" not in str(said[name][1]), name


def test_code_that_is_not_needed_is_no_reason_to_refuse(tiny_base: Path, tmp_path: Path) -> None:
    """Many folders on the hub name code for architectures that transformers has since learned."""
    from latent_control.base_lm import load_base

    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(OWN_CODE.format(marker=str(tmp_path / RAN)))
    assert type(load_base(folder)).__name__ == "LlamaForCausalLM" and not (tmp_path / RAN).exists()


def silent_loaders(source: str) -> list[int]:
    """Lines with a call of ``from_pretrained`` or ``from_config`` of a class that may run a folder's code, and no word
    on it."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_pretrained", "from_config")
        and _may_run_code(ast.unparse(node.func.value))
        and not any(keyword.arg == "trust_remote_code" for keyword in node.keywords)
    ]


def _may_run_code(owner: str) -> bool:
    """Whether ``owner`` is one of transformers' Auto classes (``kind.auto`` too), or a class of ours that hands the
    word on."""
    return owner.rpartition(".")[2].lower().startswith("auto") or owner in (
        "PreTrainedTokenizerFast",
        "LatentActionForCausalLM",
    )


def test_every_loader_says_whether_code_may_run() -> None:
    assert silent_loaders(
        "AutoModel.from_pretrained(x)\ny.AutoConfig.from_config(x, **z)\nkind.auto.from_pretrained(x)"
    ) == [1, 2, 3]
    assert (
        silent_loaders("AutoModel.from_pretrained(x, trust_remote_code=False)\nGenerationConfig.from_pretrained(x)")
        == []
    )
    found: list[Any] = [
        f"{path.relative_to(ROOT)}:{line}"
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for line in silent_loaders(path.read_text(encoding="utf-8"))
    ]
    assert not found


def test_the_setting_is_a_plain_boolean() -> None:
    """``None`` would be the question."""
    from configs.schema import Base

    assert Base(model="x").trust_remote_code is False
    with pytest.raises(ValueError, match="trust_remote_code"):
        Base.model_validate({"model": "x", "trust_remote_code": None})
