"""Configs that come with the program, found by name from any folder, and a method that stands alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs import install
from configs.loading import ConfigErrors, load_config
from configs.paths import packaged_configs
from pipeline.cli import shell_completion
from pipeline.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_name_finds_the_config_from_any_folder(elsewhere: Path) -> None:
    by_path = load_config(CONFIGS / "quickstart.yaml")
    assert load_config("quickstart") == load_config("quickstart.yaml") == by_path
    assert load_config("quickstart", ["improve.updates=5"]).improve.updates == 5


def test_every_packaged_config_is_found_and_only_inputs_are_missing(elsewhere: Path) -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == packaged_configs().keys()
    for name in packaged_configs():
        load_config(name, check_paths=False)


def test_a_file_of_that_name_goes_first(elsewhere: Path) -> None:
    (elsewhere / "quickstart").write_text("base: {model: m}\nseed: 7\n")
    assert load_config("quickstart", check_paths=False).seed == 7
    (elsewhere / "quickstart").unlink()
    (elsewhere / "quickstart").mkdir()  # a run's folder, say
    assert load_config("quickstart").seed == 0


def test_runs_that_a_packaged_config_names_are_in_the_working_folder(elsewhere: Path) -> None:
    config = load_config("improve_offline", check_paths=False)
    assert config.base.model == str(CONFIGS / "models" / "countdown-habit-1m")
    assert config.actions.init == str(elsewhere / "runs" / "first" / "checkpoints" / "clone")
    assert config.improve_offline.data[0].path == str(elsewhere / "runs" / "first")


def test_what_is_trained_is_never_written_into_the_package(elsewhere: Path) -> None:
    for name in packaged_configs():
        config = load_config(name, check_paths=False)
        if config.base.train is not None:
            assert Path(config.base.model).is_relative_to(elsewhere), name


def test_a_users_own_paths_are_relative_to_the_working_folder(elsewhere: Path) -> None:
    (elsewhere / "mine").mkdir()
    assert load_config("quickstart", ["base.model=./mine"]).base.model == str(elsewhere / "mine")


def test_a_path_reads_as_before(tmp_path: Path) -> None:
    (tmp_path / "models" / "countdown-habit-1m").mkdir(parents=True)
    copy = tmp_path / "quickstart.yaml"
    copy.write_text((CONFIGS / "quickstart.yaml").read_text())
    assert load_config(copy, check_paths=False).base.model == str(tmp_path / "models" / "countdown-habit-1m")


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("configs/quickstart.yaml", "quickstart alone takes the config of that name that comes with this program"),
        ("quikstart", "did you mean quickstart, which comes with this program?"),
        ("mine", "those that come with this program: agents_textworld, base_countdown"),
    ],
)
def test_a_name_that_nothing_has(elsewhere: Path, given: str, hint: str) -> None:
    with pytest.raises(ConfigErrors, match="does not exist") as raised:
        load_config(given)
    assert hint in str(raised.value)


def test_the_command_says_which_file_was_taken_and_keeps_stdout_clean(elsewhere: Path) -> None:
    shown = CliRunner().invoke(app, ["config", "show", "quickstart", "seed=4"])
    assert shown.exit_code == 0
    assert shown.stderr == f"quickstart: {CONFIGS / 'quickstart.yaml'}, which comes with this program\n"
    assert shown.stdout.startswith("seed: 4\n")
    (elsewhere / "own.yaml").write_text(shown.stdout)
    assert CliRunner().invoke(app, ["config", "show", "own.yaml"]).stderr == ""


def test_completion_offers_the_names(elsewhere: Path) -> None:
    (elsewhere / "quick.yaml").touch()
    assert shell_completion.config_files("quick") == ["quick.yaml", "quickstart"]


def test_a_user_without_entry_and_home_has_one() -> None:
    """As in a container that is run as any user; MLflow asks for a home when it is imported."""
    script = """
import pwd, pathlib
def nobody(uid):
    raise KeyError(uid)
pwd.getpwuid = nobody
import pipeline
print(pathlib.Path.home())
"""
    environment = {"PYTHONPATH": str(ROOT), "TMPDIR": "/tmp"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "/tmp\n", done.stderr


def test_the_remedy_for_a_missing_package_fits_how_this_was_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert install.install_command("tasks") == "pip install -c requirements.lock -e '.[tasks]'"
    assert install.install_command() == "pip install -c requirements.lock -e ."
    monkeypatch.setattr(install, "LOCK", ROOT / "nothing")
    assert install.install_command("tasks") == "pip install 'latent-control[tasks]'"
    assert install.install_command() == "pip install 'latent-control'"


@pytest.mark.slow
def test_the_wheel_works_where_no_checkout_is() -> None:
    """As .ci/run does."""
    done = subprocess.run(
        [str(ROOT / ".ci" / "wheel_smoke.sh"), sys.executable], capture_output=True, text=True, timeout=590
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "\nok\n" in done.stdout and "quickstart.yaml, which comes with this program" in done.stderr


def test_the_method_alone_needs_torch_transformers_and_safetensors() -> None:
    """A model is made, trained for a step, saved, loaded and asked, while everything that only the pipeline needs
    cannot be imported."""
    blocked = ["accelerate", "datasets", "fastapi", "matplotlib", "mlflow", "peft", "psutil", "pyarrow", "pydantic"]
    blocked += ["ray", "rich", "typer", "uvicorn", "configs", "learners", "pipeline", "rollout_workers"]
    script = f"""
import sys, tempfile
sys.modules.update(dict.fromkeys({blocked!r}))
import torch
from latent_control import LatentActionLM
model = LatentActionLM.from_base({str(CONFIGS / "models/countdown-1m")!r}, num_actions=8)
ids = torch.tensor([[5, 6, 7]])
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = LatentActionLM.from_pretrained(folder)
out = [one.generate(ids, max_new_tokens=4, codes=[3, None, 1]) for one in (model, again)]
assert torch.equal(out[0].tokens, out[1].tokens) and out[0].actions[0, 0] == 3
from latent_control import losses, search, analysis
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
