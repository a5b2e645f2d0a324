"""The command line as users meet it: subprocesses, exit codes, and what is printed where."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from configs.loading import load_config
from pipeline.cli import shell_completion
from pipeline.cli.evaluate import Estimator, off_policy
from pipeline.cli.main import app
from pipeline.cli.options import DEBUG
from pipeline.cli.session import examine
from pipeline.console.displays import Display
from pipeline.preflight import base_model, doctor, resources
from pipeline.preflight.check import check
from pipeline.tracking import server

ROOT = Path(__file__).resolve().parents[3]
HEAVY = ("torch", "ray", "transformers", "mlflow", "pyarrow", "numpy", "accelerate")


def program(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"} | environment
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture
def config_file(tmp_path):
    def make(text: str, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return make


@pytest.fixture
def fake_stages(monkeypatch):
    """Stands in for ``pipeline.run`` and ``pipeline.stages.evaluate``: counts the calls, writes nothing."""
    import types

    calls: list[tuple] = []

    def run(config, run_dir, display):
        calls.append(("run", config, run_dir, display))
        return run_dir

    def resume(run_dir, display, restore_config):
        calls.append(("resume", run_dir, display))
        return run_dir

    def evaluate(target, *, config, prompts):
        print("progress of the evaluation")
        calls.append(("evaluate", target, config, prompts))
        row = {
            "sampled": 0.25,
            "greedy": 0.5,
            "sampled_interval": [0.1, 0.4],
            "greedy_interval": [0.3, 0.7],
            "sampled_tokens": 12.0,
        }
        return {
            "prompts": prompts,
            "base": row,
            "differences": {"improved - base": {"sampled": {"mean": 0.5, "low": 0.25, "high": 0.75}}},
        }

    module = types.SimpleNamespace(run=run, resume=resume, evaluate=evaluate, calls=calls)
    for name in ("pipeline.run", "pipeline.stages.evaluate"):
        monkeypatch.setitem(sys.modules, name, module)
    return module


UNCHECKED = (
    "import sys, types\n"
    "from pipeline.preflight.problems import Findings\n"
    "sys.modules['pipeline.preflight.check'] = types.SimpleNamespace(check=lambda config: Findings([], [], []))\n"
)
"""Of a process for which the imports of the preflight, five seconds of them, are not the matter."""
TRAINS_A_BASE = "base: {model: new, train: {updates: 1}}\nevaluation: null\ntracking: {enabled: false}\n"


class TestHelp:
    def test_importing_the_command_line_loads_nothing_heavy(self):
        code = f"import sys, pipeline.cli.main; print([m for m in {HEAVY!r} if m in sys.modules])"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stdout.strip() == "[]"

    def test_help_is_quick_and_names_every_command(self):
        walls = []
        for _ in range(3):
            start = time.perf_counter()
            done = program("--help")
            walls.append(time.perf_counter() - start)
        assert done.returncode == 0
        for command in ("run", "resume", "evaluate", "config", "doctor", "ui"):
            assert f" {command} " in done.stdout
        # 0.26 s on two quiet cores; the bar is 0.5 s, the rest is for machines that do other things too.
        assert min(walls) < 1.5

    def test_reading_a_config_loads_nothing_heavy(self):
        code = (
            "import sys; from typer.testing import CliRunner; from pipeline.cli.main import app;"
            "assert CliRunner().invoke(app, ['config', 'show', 'configs/base_countdown.yaml']).exit_code == 0;"
            f"print([m for m in {HEAVY!r} if m in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stdout.strip() == "[]"

    @pytest.mark.parametrize(
        "arguments", [["nonsense"], ["run"], ["run", "x.yaml", "--nonsense"], ["evaluate", ".", "--prompts", "0"]]
    )
    def test_usage_errors_are_2(self, arguments):
        assert CliRunner().invoke(app, arguments).exit_code == 2

    def test_every_command_has_its_panel(self):
        from pipeline.cli.panels import MORE, PANELS, name_of

        every = [*app.registered_commands, *app.registered_groups]
        assert {name_of(info) for info in every if info.rich_help_panel == MORE} == {"replay"}, "hidden"
        named = [name for names in PANELS.values() for name in names]
        assert len(named) == len(set(named))

    def test_version_and_near_matches(self):
        assert CliRunner().invoke(app, ["--version"]).stdout.startswith("latent-control ")
        done = CliRunner().invoke(app, ["resum"])
        assert done.exit_code == 2 and "Did you mean 'resume'" in done.output
        assert "3 done, but a gate" in " ".join(CliRunner().invoke(app, ["--help"]).stdout.split())


class TestCompletion:
    def completed(self, words: str) -> list[str]:
        """As bash asks, the word under the cursor last."""
        env = {
            "_LATENT_CONTROL_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        }
        return program(**env).stdout.split()

    def test_in_the_shell(self):
        assert self.completed("latent-control resu") == ["resume"]
        assert self.completed("latent-control run configs/quick") == ["configs/quickstart.yaml"]
        assert self.completed("latent-control run c.yaml improve.mo") == ["improve.mode=sync", "improve.mode=async"]
        assert self.completed("latent-control run c.yaml improve.mode = as") == ["async"]

    def test_keys_and_values(self):
        assert "improve.updates=" in shell_completion.override([], "improve.")
        assert shell_completion.override([], "replay.enabled=") == ["replay.enabled=true", "replay.enabled=false"]
        assert shell_completion.override(["improve.mode"], "=") == ["sync", "async"]
        assert shell_completion.override([], "nonsense.key=") == []

    def test_paths(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("runs/first", "runs/second", "other"):
            (tmp_path / name).mkdir(parents=True)
        (tmp_path / "runs/first/config.yaml").touch()
        (tmp_path / "mine.yaml").touch()
        (tmp_path / "mine.txt").touch()
        assert shell_completion.run_folders("") == ["runs/first"] and shell_completion.run_folders("fi") == [
            "runs/first"
        ]
        assert (
            shell_completion.run_folders("runs/f") == ["runs/first"] and shell_completion.run_folders("nothing/") == []
        )
        assert shell_completion.config_files("mi") == ["mine.yaml"]


class TestAllErrorsAtOnce:
    TEXT = "base: {model: models/nothing-here}\nactions: {updats: 3}\nclone: {updates: three}\n"

    def test_a_typo_a_wrong_type_and_a_missing_path(self, config_file, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        path = config_file(self.TEXT)
        models = tmp_path / "models"
        models.mkdir()
        for command in (["config", "check", str(path)], ["run", str(path), "--run-dir", "r"]):
            done = CliRunner().invoke(app, command)
            assert done.exit_code == 2
            assert done.stdout == ""
            assert done.stderr.splitlines() == [
                f"{path}: 3 errors, nothing was started",
                "  - actions.updats: unknown; did you mean actions.updates? [line 2]",
                '  - clone.updates: expected a whole number, got "three" (text) [line 3]',
                f"  - base.model: {models / 'nothing-here'} does not exist ({models} exists, nothing-here does not)",
            ]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.yaml", "models"], (
            "nothing may be started or written"
        )

    def test_preflight_errors_come_with_them(self, config_file, monkeypatch):
        monkeypatch.setattr(resources, "cpus_here", lambda: 2)
        path = config_file(
            TRAINS_A_BASE + "task: {options: {numbers: 99}}\nclone: {}\nimprove: {}\nrollout: "
            "{num_workers: 5, top: 1}\n"
        )
        _, errors, _ = examine(path, [])
        places = sorted(e.partition(" ")[0] for e in errors)
        assert places == ["clone:", "improve:", "rollout.num_workers:", "rollout.top:", "task.options.numbers"], errors

    def test_a_default_in_place_of_a_wrong_value_is_not_judged(self, config_file, monkeypatch):
        monkeypatch.setattr(resources, "cpus_here", lambda: 1)
        path = config_file(TRAINS_A_BASE + "actions: {}\nclone: {}\nimprove: {}\nrollout: {num_workers: many}\n")
        _, errors, _ = examine(path, [])
        assert errors == ['rollout.num_workers: expected a whole number, got "many" (text) [line 7]']

    def test_json(self, config_file):
        done = CliRunner().invoke(app, ["config", "check", str(config_file("base: 3\n")), "--json"])
        assert done.exit_code == 2
        assert json.loads(done.stdout)["errors"] == [
            "base: expected a section with keys of its own, got 3 (number) [line 1]"
        ]


class TestConfigCommands:
    def test_check_says_ok_and_the_stages(self, config_file):
        done = CliRunner().invoke(app, ["config", "check", str(config_file(TRAINS_A_BASE)), "base.train.updates=7"])
        assert done.exit_code == 0, done.output
        assert done.stdout.splitlines()[:2] == ["ok", "  base      7 updates of 64 sequences (task)"]

    def test_show_is_the_resolved_config(self, config_file):
        path = config_file(TRAINS_A_BASE)
        done = CliRunner().invoke(app, ["config", "show", str(path), "seed=9"])
        copy = config_file(done.stdout, "copy.yaml")
        assert load_config(copy) == load_config(path, ["seed=9"])

    def test_schema_is_json(self):
        done = CliRunner().invoke(app, ["config", "schema"])
        assert json.loads(done.stdout)["title"] == "RunConfig"

    def test_the_papers_config_passes_where_there_is_neither_hub_nor_gpu(self):
        pytest.importorskip("reasoning_gym")
        done = program("config", "check", "configs/llama31_8b_math.yaml", HF_HOME="nowhere")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("ok\n")
        assert done.stderr.startswith("warning: base.model: meta-llama/Llama-3.1-8B")


class TestPreflight:
    def test_an_unreachable_hub_id_is_an_error_when_the_run_is_here(self, config_file, monkeypatch):
        monkeypatch.setattr(base_model, "_hub_answers", lambda: False)
        config = load_config(config_file("base: {model: no-such-org/no-such-model}\ncluster: {address: local}\n"))
        errors, warnings, _ = check(config)
        assert (len(errors), warnings) == (1, [])
        assert errors[0].startswith("base.model: no-such-org/no-such-model is neither a folder nor cached")

    def test_a_folder_that_is_no_model(self, config_file, tmp_path):
        (tmp_path / "empty").mkdir()
        errors, *_ = check(load_config(config_file("base: {model: empty}\n")))
        assert [e.partition(":")[0] for e in errors] == ["base.model"]

    def test_gpus_are_counted_only_here(self, config_file, monkeypatch):
        monkeypatch.setattr(resources, "gpus_here", lambda: 1)
        text = (
            TRAINS_A_BASE + "actions: {}\nclone: {}\nimprove: {}\nrollout: {num_workers: 2, gpus_per_worker: 0.75, "
            "cpus_per_worker: 0.1}\n"
        )
        config = load_config(config_file(text))
        errors, *_ = check(config)
        assert errors == [
            "rollout.num_workers: 1.5 GPUs asked for (rollout.num_workers x rollout.gpus_per_worker = 1.5), "
            "but this machine has 1; ask for less, or set cluster.address"
        ]
        assert check(load_config(config_file(text), ["cluster.address=auto"])).errors == []

    @pytest.mark.parametrize(
        ("name", "content", "wanted"),
        [
            ("a.jsonl", '{"body": "x"}\n', "line 1: no key 'text'; it has 'body'"),
            ("a.jsonl", "not json\n", "line 1: not JSON"),
            ("a.txt", "", "is empty"),
            ("a.docx", "x", "is or holds no .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt file"),
            ("a.parquet", "x", "is not a readable Parquet file"),
        ],
    )
    def test_text_sources(self, name, content, wanted, config_file, tmp_path):
        (tmp_path / name).write_text(content)
        errors, *_ = check(load_config(config_file(TRAINS_A_BASE), [f"actions.data=[{{kind: text, path: {name}}}]"]))
        assert len(errors) == 1
        assert errors[0].startswith("actions.data[0].path: ")
        assert wanted in errors[0]

    def test_a_run_folder_without_replay(self, config_file, tmp_path):
        (tmp_path / "old").mkdir()
        errors, *_ = check(load_config(config_file(TRAINS_A_BASE), ["actions.data=[{kind: replay, path: old}]"]))
        assert len(errors) == 1
        assert "holds no replay shards" in errors[0]

    def test_blocks_and_lengths_against_the_embedded_model(self, config_file):
        model = ROOT / "configs" / "models" / "countdown-1m"
        if not (model / "config.json").is_file():
            pytest.skip("the embedded model is not there yet")
        overrides = [
            "actions={policy_layers: 5, inverse_dynamics_layers: 5, inverse_dynamics_reads: late}",
            "clone={}",
        ]
        overrides += ["task.max_prompt_tokens=2", "rollout.max_new_tokens=100000"]
        errors, *_ = check(load_config(config_file(f"base: {{model: {model}}}\n"), overrides))
        assert list(dict.fromkeys(e.partition(":")[0] for e in errors)) == [
            "actions.inverse_dynamics_layers",
            "actions.policy_layers",
            "task.max_prompt_tokens",
            "rollout.max_new_tokens",
        ]


class TestSlices:
    def test_an_unknown_field_is_an_error_that_lists_the_fields(self, config_file):
        text = (
            TRAINS_A_BASE.replace("evaluation: null", "evaluation: {slices: [target, numbrs]}")
            + "actions: {}\nclone: {}\n"
        )
        errors, *_ = check(load_config(config_file(text)))
        assert errors == [
            "evaluation.slices[1]: no prompt has the metadata field numbrs; did you mean numbers? the fields there "
            "are: numbers, target"
        ]


class TestRunResumeEvaluate:
    def test_run_makes_a_folder_name_and_hands_the_config_over(self, config_file, fake_stages, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        done = CliRunner().invoke(app, ["run", str(config_file(TRAINS_A_BASE)), "seed=5", "--quiet"])
        assert done.exit_code == 0, done.output
        ((_, config, folder, display),) = fake_stages.calls
        assert (config.seed, type(display), done.stdout) == (5, Display, "")
        assert folder.parent == tmp_path / "runs"
        assert folder.name.startswith("mine-20")

    def test_an_occupied_folder_names_resume(self, config_file, fake_stages, tmp_path):
        (tmp_path / "r").mkdir()
        (tmp_path / "r" / "x").touch()
        done = CliRunner().invoke(app, ["run", str(config_file(TRAINS_A_BASE)), "--run-dir", str(tmp_path / "r")])
        assert done.exit_code == 2
        assert f"latent-control resume {tmp_path / 'r'}" in done.stderr
        assert fake_stages.calls == []

    def test_a_folder_that_cannot_be_made_is_a_usage_error(self, config_file, fake_stages, tmp_path):
        (tmp_path / "file").touch()
        done = CliRunner().invoke(
            app, ["run", str(config_file(TRAINS_A_BASE)), "--run-dir", str(tmp_path / "file" / "r")]
        )
        assert done.exit_code == 2 and "give another folder" in done.stderr and fake_stages.calls == []

    def test_json_is_all_there_is_on_stdout_and_ends_with_the_exit_code(self, config_file, fake_stages, tmp_path):
        def work(config, run_dir, display):
            print("what a library prints")
            display.message("hello")
            (run_dir / "summary.json").write_text(json.dumps({"gates": self.GATES}))
            return run_dir

        fake_stages.run = work
        words = ["run", str(config_file(TRAINS_A_BASE)), "--json", "--run-dir"]
        done = CliRunner().invoke(app, [*words, str(tmp_path / "r")])
        events = [json.loads(line) for line in done.stdout.splitlines()]
        assert [event["event"] for event in events] == ["message", "end"]
        assert (done.exit_code, events[-1]["exit_code"], events[-1]["gates"]["passed"]) == (3, 3, False)
        assert "what a library prints" in done.stderr
        done = CliRunner().invoke(app, [*words, str(tmp_path / "r")])
        (end,) = [json.loads(line) for line in done.stdout.splitlines()]
        assert (done.exit_code, end["exit_code"]) == (2, 2) and "is not empty" in end["errors"][0]

    def test_json_also_when_c_code_writes_to_stdout(self, config_file, tmp_path):
        code = UNCHECKED + (
            "import os\n"
            "def run(config, run_dir, display):\n"
            "    os.write(1, b'from C code\\n'); display.message('hello'); raise ValueError('the data is odd: use "
            "other data')\n"
            "sys.modules['pipeline.run'] = types.SimpleNamespace(run=run)\n"
            f"sys.argv = ['latent-control', 'run', {str(config_file(TRAINS_A_BASE))!r}, '--json', '--run-dir', "
            f"{str(tmp_path / 'r')!r}]\n"
            "from pipeline.cli.main import main; main()\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        events = [json.loads(line) for line in done.stdout.splitlines()]
        assert [event["event"] for event in events] == ["message", "end"] and "from C code" in done.stderr
        assert (done.returncode, events[-1]["exit_code"], events[-1]["errors"]) == (
            1,
            1,
            ["the data is odd: use other data"],
        )

    def test_an_empty_folder_is_used(self, config_file, fake_stages, tmp_path):
        (tmp_path / "r").mkdir()
        assert (
            CliRunner()
            .invoke(app, ["run", str(config_file(TRAINS_A_BASE)), "--run-dir", str(tmp_path / "r")])
            .exit_code
            == 0
        )
        assert fake_stages.calls[0][2] == tmp_path / "r"

    @pytest.mark.parametrize(
        "error", [ValueError("the data is odd: use other data"), FileNotFoundError("x"), FloatingPointError("loss")]
    )
    def test_failures_while_working_are_one_sentence_and_1(
        self, error, config_file, fake_stages, tmp_path, monkeypatch
    ):
        def fail(config, run_dir, display):
            raise error

        fake_stages.run = fail
        monkeypatch.delenv(DEBUG, raising=False)
        done = CliRunner().invoke(app, ["run", str(config_file(TRAINS_A_BASE)), "--run-dir", str(tmp_path / "r")])
        assert done.exit_code == 1
        assert done.stderr == f"error: {error} (the traceback: latent-control --debug ...)\n"
        monkeypatch.setenv(DEBUG, "1")
        assert (
            CliRunner()
            .invoke(app, ["run", str(config_file(TRAINS_A_BASE)), "--run-dir", str(tmp_path / "q")])
            .exception
            is error
        )

    def test_a_defect_keeps_its_traceback(self, config_file, fake_stages, tmp_path):
        def fail(config, run_dir, display):
            raise KeyError("a defect")

        fake_stages.run = fail
        done = CliRunner().invoke(app, ["run", str(config_file(TRAINS_A_BASE)), "--run-dir", str(tmp_path / "r")])
        assert isinstance(done.exception, KeyError)

    def test_resume_wants_a_run_folder(self, fake_stages, tmp_path):
        for folder, wanted in ((tmp_path, "is not a run folder"), (tmp_path / "absent", "does not exist")):
            done = CliRunner().invoke(app, ["resume", str(folder)])
            assert done.exit_code == 2
            assert wanted in done.stderr
        (tmp_path / "config.yaml").touch()
        assert CliRunner().invoke(app, ["resume", str(tmp_path)]).exit_code == 0
        assert fake_stages.calls == [("resume", tmp_path, None)]

    def test_evaluate_prints_a_table_or_json_and_nothing_else_on_stdout(self, fake_stages, config_file, tmp_path):
        done = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--prompts", "8"])
        assert (
            done.exit_code == 2 and "neither a run folder nor a checkpoint" in done.stderr and fake_stages.calls == []
        )
        config_file(TRAINS_A_BASE, "config.yaml")
        done = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--prompts", "8"])
        assert done.stdout.splitlines() == [
            "success  sampled  95 % interval  greedy  95 % interval  tokens",
            "base     0.250    0.100 - 0.400  0.500   0.300 - 0.700  12.0",
            "gain             sampled  95 % interval",
            "improved - base  +0.500   +0.250 to +0.750",
            "8 held-out prompts, one sampled and one greedy rollout per prompt",
        ]
        done = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--prompts", "8", "--json"])
        assert json.loads(done.stdout)["base"]["greedy"] == 0.5

    GATES = {  # noqa: RUF012
        "passed": False,
        "verdicts": [
            {"gate": "success >= 0.2", "variant": "improved", "value": 0.25, "passed": True, "tag": ""},
            {"gate": "coverage > 0.5", "variant": "improved", "value": None, "passed": False, "tag": ""},
        ],
    }

    @pytest.mark.parametrize("command", ["run", "resume"])
    def test_a_failed_gate_is_3_after_the_run_is_done(self, command, config_file, fake_stages, tmp_path, monkeypatch):
        path, folder = config_file(TRAINS_A_BASE), tmp_path / "r"

        def work(*arguments):
            folder.mkdir(exist_ok=True)
            (folder / "summary.json").write_text(json.dumps({"gates": self.GATES}))
            return folder

        fake_stages.run = fake_stages.resume = work
        if command == "resume":
            folder.mkdir()
            (folder / "config.yaml").touch()
        arguments = ["run", str(path), "--run-dir", str(folder)] if command == "run" else ["resume", str(folder)]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 3
        assert done.stdout.splitlines()[0] == f"run folder: {folder}"
        assert done.stdout.splitlines()[-1] == "gate passed: success >= 0.2  (improved: 0.25)"
        assert done.stderr == "gate FAILED: coverage > 0.5  (improved: not measured)\n"

    def test_evaluate_obeys_the_gates_too(self, fake_stages, config_file, tmp_path):
        config_file(TRAINS_A_BASE, "config.yaml")
        plain = fake_stages.evaluate
        fake_stages.evaluate = lambda target, *, config, prompts: (
            plain(target, config=config, prompts=prompts) | {"gates": self.GATES}
        )
        done = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--prompts", "8", "--json"])
        assert done.exit_code == 3
        assert json.loads(done.stdout)["gates"] == self.GATES

    def test_evaluate_with_a_seed_takes_the_runs_own_config(self, fake_stages, config_file, tmp_path):
        config_file(TRAINS_A_BASE, "config.yaml")
        checkpoint = tmp_path / "checkpoints" / "clone"
        checkpoint.mkdir(parents=True)
        assert CliRunner().invoke(app, ["evaluate", str(checkpoint), "--seed", "4"]).exit_code == 0
        assert fake_stages.calls[0][2].seed == 4

    @pytest.mark.skipif(os.name != "posix", reason="signals")
    def test_ctrl_c_says_how_to_go_on(self, config_file, tmp_path):
        path, folder = config_file(TRAINS_A_BASE), tmp_path / "r"
        code = UNCHECKED + (
            "import pathlib, signal, time\n"
            # A shell that starts the tests in the background has them ignore Ctrl-C.
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "def run(config, run_dir, display):\n"
            "    (run_dir / 'config.yaml').touch(); print('working', flush=True); time.sleep(60)\n"
            "sys.modules['pipeline.run'] = types.SimpleNamespace(run=run)\n"
            f"sys.argv = ['latent-control', 'run', {str(path)!r}, '--run-dir', {str(folder)!r}]\n"
            "from pipeline.cli.main import main; main()\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "working\n"
            child.send_signal(signal.SIGINT)
            _, words = child.communicate(timeout=60)
        assert child.returncode == 130
        assert words.strip() == f"interrupted; continue with: latent-control resume {folder}"


class TestDoctor:
    def test_says_what_there_is(self):
        done = CliRunner().invoke(app, ["doctor", "--json"])
        found = {f["name"]: f for f in json.loads(done.stdout)["findings"]}
        assert found["torch"]["state"] in ("ok", "other version")
        assert done.exit_code == 0

    def test_a_missing_core_package_is_1_and_names_the_command(self, monkeypatch):
        monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("ray", "reasoning-gym") else "1.0")
        findings = {f.name: f for f in doctor.examine()}
        assert (findings["ray"].state, findings["ray"].remedy) == ("missing", "pip install -c requirements.lock -e .")
        assert findings["reasoning-gym"].state == "optional"
        assert not doctor.is_fine(list(findings.values()))

    def test_the_cpu_build_is_the_pinned_version(self, monkeypatch):
        monkeypatch.setattr(doctor, "_version", lambda name: {"torch": "2.13.0+cpu", "ray": "1.0"}[name])
        pins = doctor.read_pins("# a comment\ntorch==2.13.0\nray==2.60.0\n")
        assert doctor._core("torch", pins).state == "ok"
        assert doctor._core("ray", pins).found == "1.0, tested with 2.60.0"


class TestUi:
    def test_stores(self, tmp_path):
        run = tmp_path / "run"
        run.mkdir()
        uri = f"sqlite:///{tmp_path}/mlflow.db"
        (run / "mlflow.json").write_text(
            json.dumps({"tracking_uri": uri, "experiment_id": "3", "runs": {"clone": "ab"}})
        )
        (tmp_path / "mlflow.db").touch()
        assert server.find_store(str(run)) == server.Store(uri=uri, experiment_id="3", runs={"clone": "ab"})
        assert server.find_store(str(tmp_path)).uri == uri
        assert server.find_store(str(tmp_path / "mlflow.db")).uri == uri
        assert server.find_store("http://host:1").uri == "http://host:1"
        with pytest.raises(FileNotFoundError, match=r"mlflow\.db"):
            server.find_store(str(tmp_path / "mlfow.db"))
        with pytest.raises(ValueError, match=r"no mlflow\.json"):
            server.find_store(str(ROOT / "configs"))

    def test_links(self):
        store = server.Store(uri="x", experiment_id="3", runs={"clone": "ab"})
        assert server.links("http://h:1/", store, {"3": "mine"}) == [
            "charts of mine: http://h:1/#/experiments/3/runs?workflowType=machine_learning&compareRunsMode=CHART",
            "stage clone: http://h:1/#/experiments/3/runs/ab",
        ]
        rl = server.links("http://h:1", server.Store(uri="x", experiment_id="3", runs={"improve": "cd"}), {})
        assert rl[0].startswith("improve of all runs: http://h:1/#/experiments/3/runs?")
        assert rl[0].endswith("&searchFilter=tags.stage%20%3D%20%22improve%22")
        link = "http://h:1/#/compare-runs?runs=%5B%22ab%22%2C%22cd%22%5D&experiments=%5B%223%22%5D"
        assert server.compare_link("3", ["ab", "cd"], "http://h:1/") == link

    def test_a_taken_port_names_a_free_one(self):
        with socket.socket() as taken:
            taken.bind((server.HOST, 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(ValueError, match=rf"port {port} is taken; --port \d+ is free"):
                server.choose_port(port)

    @pytest.mark.slow
    def test_serves_the_store_and_ends_with_it(self, tmp_path):
        with socket.socket() as probe:
            probe.bind((server.HOST, 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "pipeline", "ui", f"sqlite:///{tmp_path}/mlflow.db", "--port", str(port)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            first = child.stdout.readline()
            assert first.startswith(f"charts of Default: http://127.0.0.1:{port}/#/experiments/")
            child.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(30)
        assert child.returncode == 0
        assert server._is_free(port)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--replay", "nowhere"], "nowhere"),
        (["--replay", ".", "--versions", "9-3"], "--versions is '9-3'; write the first and the last policy version"),
        ([], "Missing option '--replay'"),
    ],
)
def test_off_policy_says_what_is_wrong_before_it_starts(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["off-policy", str(tmp_path), *arguments])
    assert result.exit_code == 2 and said in " ".join(result.output.replace("│", " ").split())


def test_estimators_of_the_command_line_are_those_there_are() -> None:
    from latent_control.off_policy import ESTIMATORS, RECOMMENDED

    assert get_args(Estimator) == tuple(ESTIMATORS)
    assert inspect.signature(off_policy).parameters["estimator"].default == RECOMMENDED
