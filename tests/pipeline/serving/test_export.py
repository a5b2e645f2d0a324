"""``export``: what the folder holds, what is refused, and its registration in MLflow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from rl_tools import Config
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from configs.loading import dump_config
from latent_control import LatentActionLM
from latent_control.pretrained import world_hash
from pipeline.cli.main import app
from pipeline.cli.options import FAILED, USAGE
from pipeline.serving.export import Source, export, find, provenance
from pipeline.storage import checkpoints

pytest_plugins = ("rl_fixtures",)


def call(*words: str | Path) -> Any:
    return CliRunner().invoke(app, list(map(str, words)))


@pytest.fixture(scope="module")
def exported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "first"
    done = call("export", finished_run, "-o", folder)
    assert done.exit_code == 0, done.output
    assert f"latent-control serve {folder}" in done.output
    return folder


def test_the_folder_holds_what_answers_and_nothing_else(
    exported: Path, finished_run: Path, tiny_checkpoint: Path
) -> None:
    files = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert {Path(name).suffix for name in files} == {".json", ".md", ".safetensors"}
    assert {
        "latent_actions.safetensors",
        "base/model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "provenance.json",
    } <= files
    assert not checkpoints.verify(exported)
    trained = LatentActionLM.from_pretrained(tiny_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert model.latent.inverse_dynamics is None
    assert world_hash(model.latent) == world_hash(trained)
    batch = AutoTokenizer.from_pretrained(exported, padding_side="left")(
        ["3 5 7", "10"], return_tensors="pt", padding=True
    )
    wanted = trained.generate(batch.input_ids, batch.attention_mask, max_new_tokens=6, temperature=0.0)
    out = model.generate(**batch, return_codes=True)  # as many tokens as the run's rollouts
    assert torch.equal(out.codes, wanted.actions[:, : out.codes.shape[1]])
    assert int(wanted.lengths.max()) == out.codes.shape[1]


def test_it_says_where_it_comes_from(exported: Path, finished_run: Path, tiny_checkpoint: Path) -> None:
    about = json.loads((exported / "provenance.json").read_text())
    assert (about["run"], about["checkpoint"]) == ("first", "clone")
    assert about["evaluation"] == {"cloned": {"greedy": 0.5}}
    assert about["world_hash"] == world_hash(LatentActionLM.from_pretrained(tiny_checkpoint))
    assert about["config"]["rollout"]["max_new_tokens"] == 6
    assert "torch" in about["trained_with"]
    assert (
        str(finished_run)
        not in (exported / "config.json").read_text() + (exported / "latent_action_config.json").read_text()
    )


@pytest.mark.parametrize(
    ("codes", "done", "last"),
    [
        ("policy", ("actions", "clone", "finetune"), "finetune"),
        ("policy", ("actions", "clone", "finetune", "improve"), "improve"),
        # FTA-I changes the base LM under its policy, which is then cloned again.
        ("inverse_dynamics", ("actions", "clone", "finetune"), "clone"),
        ("inverse_dynamics", ("actions", "clone", "finetune", "reclone"), "reclone"),
    ],
)
def test_the_last_policy_of_a_run_is_exported(
    config: Config, tiny_checkpoint: Path, tmp_path: Path, codes: str, done: tuple[str, ...], last: str
) -> None:
    sections = {"actions": {"num_actions": 8}, "clone": {}, "finetune": {"codes": codes}}
    (tmp_path / "config.yaml").write_text(dump_config(config(**sections, tracking={"enabled": False})))
    for stage in done:
        checkpoints.write(
            tmp_path / "checkpoints" / stage,
            files=lambda staging: LatentActionLM.from_pretrained(tiny_checkpoint).save_pretrained(staging) and None,
            info={"stage": stage, "metrics": {}},
        )
    assert find(tmp_path).checkpoint == tmp_path / "checkpoints" / last


def test_passwords_stay_at_home(finished_run: Path) -> None:
    source = find(finished_run)
    config = source.config()
    assert config is not None
    config = config.model_copy(
        update={"tracking": config.tracking.model_copy(update={"uri": "http://me:secret@host/x"})}
    )
    model = LatentActionLM.from_pretrained(source.checkpoint)
    assert "secret" not in json.dumps(provenance(source, model, config))


def test_a_moved_base_is_found_again_or_asked_for(
    finished_run: Path, tiny_base: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(tiny_checkpoint, tmp_path / "lost")
    path = tmp_path / "lost" / "latent_action_config.json"
    config = json.loads(path.read_text())
    config["base"]["path"] = str(tmp_path / "gone")
    path.write_text(json.dumps(config))
    failed = call("export", tmp_path / "lost", "-o", tmp_path / "out")
    assert failed.exit_code == FAILED
    assert (
        f"lay at {tmp_path / 'gone'}, where it is no longer: say where it is now (base=FOLDER, or --base FOLDER)"
        in failed.output
    )
    assert not (tmp_path / "out").exists()
    shutil.copytree(tiny_base, moved)
    assert call("export", tmp_path / "lost", "-o", tmp_path / "out", "--base", moved, "--reference-base").exit_code == 0
    assert not (tmp_path / "out" / "base").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").latent.base_source == str(moved)


def test_wrong_targets_are_refused_with_the_remedy(finished_run: Path, exported: Path, tmp_path: Path) -> None:
    def refused(*words: str | Path) -> str:
        result = call("export", *words)
        assert result.exit_code == USAGE, result.output
        return result.output

    assert "there is nothing at" in refused(tmp_path / "nothing")
    assert "is neither a run folder nor a checkpoint" in refused(tmp_path)
    assert "is an export already: register it with --register NAME" in refused(exported)
    assert "--alias needs --register NAME" in refused(finished_run, "--alias", "champion")
    assert "which MLflow store? This is not a run: name it with --store URI" in refused(exported, "--register", "x")
    copy = tmp_path / "run"
    shutil.copytree(finished_run, copy)
    weights = copy / "checkpoints" / "clone" / "latent_actions.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "is damaged (latent_actions.safetensors has" in refused(copy)
    checkpoints.write(copy / "checkpoints" / "actions", files=copy_of(finished_run), info={"stage": "actions"})
    assert "is untrained: stage actions only finds codes" in refused(copy / "checkpoints" / "actions")
    (copy / "checkpoints" / "improve").mkdir()
    assert "improve is not a latent-action checkpoint" in refused(copy)
    (copy / "checkpoints" / "improve" / "token_policy.json").write_text("{}")
    assert "is a policy over tokens: it has no codes to serve" in refused(copy)
    done = call("export", finished_run, "-o", exported)
    assert done.exit_code == FAILED
    assert "is there already; give another folder with -o" in done.output


def copy_of(run: Path) -> Any:
    return lambda staging: shutil.copy(run / "checkpoints" / "clone" / "latent_action_config.json", staging) and None


CLEAN = """
import json, sys
import mlflow, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/countdown@champion")
import latent_control
rows = pandas.DataFrame({"prompt": ["3 5 7", "10"]})
free = model.predict(rows)
asked = {"max_tokens": 3, "temperature": 1.0, "seed": 2, "allowed_codes": [1, 4]}
steered = model.predict(rows.assign(codes=[[2, 5], [7]]), params={"max_tokens": 3})
masked = model.predict(rows, params=asked)
print(json.dumps({"code": latent_control.__file__, "free": free.to_dict("list"), "steered": steered.to_dict("list"),
                  "masked": masked.to_dict("list"), "paths": sys.path}))
"""


def test_a_registered_model_answers_in_a_clean_environment(exported: Path, tmp_path: Path) -> None:
    """Registering takes ten seconds, loading as many: one test for both."""
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    own = tmp_path / "own"  # it is gone when the model is loaded
    shutil.copytree(exported, own)
    done = call("export", own, "--register", "countdown", "--alias", "champion", "--store", store, "--json")
    assert done.exit_code == 0, done.output
    registered = json.loads(done.stdout)["registered"]
    assert (registered["uri"], registered["alias"]) == ("models:/countdown/1", "champion")
    kept = [path for path in (tmp_path / "mlartifacts").rglob("*") if path.is_file()]
    assert {path.suffix for path in kept} <= {".json", ".safetensors", ".py", ".yaml", ".txt", ".md", ""}
    assert not [path for path in kept if path.suffix == "" and path.name != "MLmodel"]
    signature = next(path for path in kept if path.name == "MLmodel").read_text()
    assert "allowed_codes" in signature
    wanted = AutoModelForCausalLM.from_pretrained(own)
    tokenizer = AutoTokenizer.from_pretrained(own)
    out = wanted.generate(tokenizer("3 5 7", return_tensors="pt").input_ids, return_codes=True)
    shutil.rmtree(own)
    bare = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")}
    found = subprocess.run(
        [sys.executable, "-c", CLEAN, store],
        cwd=tmp_path,
        env=bare,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    said = json.loads(found.stdout.splitlines()[-1])
    assert Path(said["code"]).is_relative_to(tmp_path / "mlartifacts")
    assert said["free"]["codes"][0] == out.codes[0].tolist()
    assert said["free"]["text"][0] == tokenizer.decode(out.sequences[0, 4:], skip_special_tokens=True)
    assert said["steered"]["codes"][0][:2] == [2, 5]
    assert said["steered"]["codes"][1][0] == 7
    assert {code for codes in said["masked"]["codes"] for code in codes} <= {1, 4}


def test_only_what_travels_is_registered(finished_run: Path, tmp_path: Path) -> None:
    from pipeline.serving.registry import register

    folder = export(find(finished_run), tmp_path / "out", reference=True)
    with pytest.raises(
        ValueError,
        match=r"refers to a base LM at .*, which other machines lack: export without "
        r"--reference-base",
    ):
        register(folder, "x", store=f"sqlite:///{tmp_path / 'no.db'}", experiment="x")
    weights = folder / "latent_actions.safetensors"
    weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"is damaged \(latent_actions.safetensors has"):
        register(folder, "x", store=f"sqlite:///{tmp_path / 'no.db'}", experiment="x")
    assert not (tmp_path / "no.db").exists()


def test_a_checkpoint_outside_of_a_run_has_no_defaults(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = find(tiny_checkpoint)
    assert source == Source(checkpoint=tiny_checkpoint, run_dir=None)
    model = AutoModelForCausalLM.from_pretrained(export(source, tmp_path / "out"))
    with pytest.raises(ValueError, match="generate needs max_new_tokens"):
        model.generate(torch.tensor([[1, 3]]))
