"""The benchmarks' own code: rounds, ratios and tables by hand, and every script from end to end at toy size."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest_plugins = ("rl_fixtures",)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def common() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_common", ROOT / "benchmarks" / "common.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sides_take_turns_and_the_order_turns_round(common: ModuleType) -> None:
    calls: list[str] = []

    def side(name: str, measures: list[float]):
        def measure() -> float:
            calls.append(name)
            return measures.pop(0)

        return measure

    measured = common.alternate({"a": side("a", [9, 1, 2, 3]), "b": side("b", [9, 4, 5, 6])}, 3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert measured == {"a": [1, 2, 3], "b": [4, 5, 6]}  # the warm-up is not among them


def test_ratio_is_paired_by_round(common: ModuleType) -> None:
    # medians over all rounds would say 4 / 2 = 2; the machine was slow in the second round on both sides
    assert common.ratio([4, 1, 9], [2, 1, 3]) == {"median": 2, "min": 1, "max": 3}
    with pytest.raises(ValueError):
        common.ratio([1, 2], [1])


def test_cells_and_table(common: ModuleType) -> None:
    assert common.spread([3, 1000.4, 0.25]) == "3 (0.25 - 1,000)"
    lines = common.table([{"side": "ours", "rate": 1234.5}, {"side": "x", "rate": 0.5}]).splitlines()
    assert lines == ["| side | rate  |", "|------|-------|", "| ours | 1,234 |", "| x    | 0.5   |"]


def test_report_says_where_and_how(common: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = common.report("name", [{"side": "ours"}], {"raw": [1, 2]}, tmp_path / "new")
    content = json.loads(path.read_text())
    assert path == tmp_path / "new" / "name.json"
    assert (content["benchmark"], content["rows"], content["raw"]) == ("name", [{"side": "ours"}], [1, 2])
    assert {"date", "processor", "cores", "memory_gb", "torch_threads", "python", "packages", "commit"} <= content[
        "machine"
    ].keys()
    assert content["machine"]["packages"]["pyarrow"]
    assert "| ours |" in capsys.readouterr().out


def test_a_peer_answers_until_it_dies(common: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "peer.py"
    script.write_text(
        "import json, os, sys\n"
        "plus = json.loads(sys.argv[1])['plus']\n"
        "for line in sys.stdin:\n"
        "    if json.loads(line) < 0:\n"
        "        sys.exit(3)\n"
        "    print(json.loads(line) + plus + int(os.environ['OMP_NUM_THREADS']), flush=True)\n"
    )
    with common.Peer(sys.executable, str(script), {"plus": 10}, threads=100) as peer:
        assert [peer.ask(1), peer.ask(2)] == [111, 112]
        with pytest.raises(RuntimeError, match="exit code 3"):
            peer.ask(-1)


def test_tables_go_between_their_marks(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TABLES, str(tmp_path)],
        cwd=ROOT / "benchmarks",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(
        "a\n<!-- table x -->\n| side |\n|------|\n| ours |\n\n2026-11-23, cpu, 2 cores, torch 2.13, commit c.\n<!-- "
        "end -->\n"
    )
    assert done.stdout.endswith("<!-- table y -->\nNot measured yet.\n<!-- end -->\n")


TABLES = """
import json, sys
from pathlib import Path
from tables import filled
machine = {"date": "2026-11-23T10:00", "processor": "cpu", "cores": 2, "packages": {"torch": "2.13"}, "commit": "c"}
(Path(sys.argv[1]) / "x.json").write_text(json.dumps({"rows": [{"side": "ours"}], "machine": machine}))
print(filled("a\\n<!-- table x -->\\nold\\n<!-- end -->\\n<!-- table y -->\\n<!-- end -->", Path(sys.argv[1])))
"""


def test_what_latent_rl_spends_is_measured_against_the_whole_budget_of_the_other() -> None:
    code = """
import sys
from baselines import against, best_rates
from common import Curve

def curve(rewards, seconds):
    return Curve(rewards=rewards, seconds=seconds, sampling=[], updating=[], format=[], summary={}, heldout={})

ours = curve([0.0] * 10 + [1.0] * 10, [1.0] * 20)  # the mean of ten is 0.5 after 15 updates
never = curve([0.0] * 20, [1.0] * 20)
other = curve([0.2] * 20 + [0.5] * 10, [2.0] * 30)
(rollouts, walls, itself), reached = against([ours, never], [other, other])
print(rollouts["value"], walls["value"], itself["value"], reached)
tried = [{"side": "a", "rate": 1, "reward": 0.1}, {"side": "a", "rate": 2, "reward": 0.3}]
print(best_rates(tried, ["a"]))
"""
    studies = ROOT / "benchmarks" / "studies"
    done = subprocess.run([sys.executable, "-c", code], cwd=studies, capture_output=True, text=True, check=True)
    spent, rates = done.stdout.splitlines()
    assert spent == f"{(15 / 30 + 20 / 30) / 2} {(15 / 60 + 20 / 60) / 2} 1.0 1"
    assert rates == "{'a': 2}"


def test_rollouts_until_a_reward_are_those_sampled_until_the_window_has_it() -> None:
    """Windows of two updates: 0.4 of 10 and 0.7 of 30 make 25 of 40, 0.625; before it was 0.4. The third is not needed;
    where 0.9 is never reached, all 50 count. The last 35 rollouts are 40 after two updates, and the last 40, whose mean
    is 0.75, after three."""
    code = """
from half_rollouts import rollouts_to
steps = [{"reward": r, "rollouts": n} for r, n in ((0.4, 10), (0.7, 30), (0.9, 10))]
print(rollouts_to(steps, 0.625, 2), rollouts_to(steps, 0.63, 2), rollouts_to(steps, 0.9, 2), rollouts_to([], 0.5, 2))
print(rollouts_to(steps, 0.62, 1, 35), rollouts_to(steps, 0.74, 1, 35), rollouts_to(steps, 0.1, 1, 60))
"""
    studies = ROOT / "benchmarks" / "studies"
    done = subprocess.run([sys.executable, "-c", code], cwd=studies, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(40, True) (50, True) (50, False) (0, False)\n(40, True) (50, True) (50, False)"


def run(script: str, out: Path, *words: str) -> dict:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / f"{script}.py"),
        "--quick",
        "--repeats",
        "2",
        "--out",
        str(out),
        *words,
    ]
    # Away from the repository: the scripts must find the packages themselves.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads((out / f"{script}.json").read_text())
    assert {"benchmark", "command", "machine", "rows"} <= content.keys() and content["rows"]
    assert content["benchmark"] == script
    return content


@pytest.mark.slow
def test_replay(tmp_path: Path) -> None:
    measured = run("replay", tmp_path)["measured"]
    assert measured.keys() == {"long", "tiny"}
    for sides in measured.values():
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in sides["seconds"].values())
        assert {name.split()[0] for name in sides["seconds"]} == {"write", "stream"}


@pytest.mark.slow
def test_rescoring(tmp_path: Path) -> None:
    for found in run("rescoring", tmp_path, "--models", "tiny")["measured"].values():
        assert max(found["sound"]) < 1e-4 and min(found["mixed_up"]) > 0.02


@pytest.mark.slow
def test_verifiers(tmp_path: Path) -> None:
    found = run("verifiers", tmp_path)["rows"]
    assert {row["responses"] for row in found} == {"arithmetic", "mixed", "sentences"}


@pytest.mark.slow
def test_bank(tmp_path: Path) -> None:
    rows = run("bank", tmp_path, "--parts", "decode")["rows"]
    assert [row["policies"] for row in rows] == [1, 3] and {row["bytes / own"] for row in rows} == {1.0}


@pytest.mark.slow
def test_bank_training(tmp_path: Path) -> None:
    (row,) = run("bank", tmp_path, "--parts", "train")["rows"]
    assert row["trained"].startswith("2 policies, 1 updates of 2 x 8 rollouts") and float(row["times as fast"][:4]) > 0


@pytest.mark.slow
def test_serving(tmp_path: Path) -> None:
    rows = run("serving", tmp_path, "--without-ray")["rows"]
    assert [(row["streams at once"], row["failed"]) for row in rows] == [("2", 0), ("6", 0)]


@pytest.mark.slow
def test_decode(tmp_path: Path) -> None:
    measured = run("decode", tmp_path, "--models", "tiny")["measured"]
    assert all(min(rates) > 0 for case in measured.values() for rates in case["tokens_per_second"].values())


@pytest.mark.slow
def test_decode_by_token(tmp_path: Path) -> None:
    (rates,) = run("decode_by_token", tmp_path, "--models", "tiny")["measured"].values()
    assert list(rates) == ["by code", "k = 2", "k = 4", "k = 8", "k = 16", "k = all"]
    assert all(len(values) == 2 and min(values) > 0 for values in rates.values())


@pytest.mark.slow
def test_gpu_script_on_the_processor(tmp_path: Path) -> None:
    content = run("gpu", tmp_path, "--device", "cpu")
    assert content["limits"]["bytes_per_second"] > 1e8 and content["limits"]["flop_per_second"] > 1e8
    assert [row["what"].split(",")[0] for row in content["rows"]] == [
        "decode",
        "prefill",
        "decode static",
        "ship",
        "recompute",
        "update",
    ]


@pytest.mark.slow
def test_update(tmp_path: Path) -> None:
    (measured,) = run("update", tmp_path, "--models", "tiny")["measured"].values()
    sides = {"latent", "token-level", "recompute", "put and get", "put and get, bare"}
    assert measured["seconds"].keys() == sides and measured["rollouts"] == 16


@pytest.mark.slow
def test_the_gpu_session_on_the_processor(tmp_path: Path) -> None:
    script = [str(ROOT / "benchmarks" / "gpu_session.sh"), str(tmp_path)]
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"CPU": "1", "OMP_NUM_THREADS": "1", "PATH": programs}
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    steps = [line for line in done.stdout.splitlines() if ": exit " in line]
    assert done.returncode == 0, (tmp_path / "session.log").read_text()[-3000:]
    assert [step.partition(":")[0] for step in steps][:3] == [
        "kernel parity, CUDA graphs",
        "shares of the card",
        "quickstart",
    ]
    assert (tmp_path / "gpu.json").is_file() and (tmp_path / "quickstart" / "summary.json").is_file()


@pytest.mark.slow
def test_publish(tmp_path: Path) -> None:
    content = run("publish", tmp_path)
    slow = {name: 1 / statistics.median(rates) for name, rates in content["gigabytes_per_second"].items()}
    assert content["setting"] == pytest.approx(
        {"publish_gb": 1 / (slow["copy"] + slow["hash"] + slow["put"]), "load_gb": 1 / (slow["hash"] + slow["load"])}
    )


@pytest.mark.slow
def test_workers(tmp_path: Path) -> None:
    rates = run("workers", tmp_path)["tokens_per_second"]
    assert rates.keys() == {"1", "2"} and all(len(values) == 2 and min(values) > 0 for values in rates.values())


@pytest.mark.slow
def test_scaling(tmp_path: Path) -> None:
    measured = run("scaling", tmp_path)["measured"]
    assert [(m["kind"], m["workers"]) for m in measured] == [("real", 1), ("light", 1), ("light", 2)]
    for window in (window for m in measured for window in m["windows"]):
        assert 0 < window["main_thread_ms"] <= window["driver_ms"]
        # Features of the base are most of a record: 128 wide, float32, for at least one token.
        assert window["bytes"] > 4 * 128


@pytest.mark.slow
def test_rllib_overhead(tmp_path: Path) -> None:
    content = run("rllib_overhead", tmp_path)
    assert content["actions_per_second"].keys() == {"RLlib PPO", "ours, decode at once", "ours"}
    assert content["actions_per_update"] == 64


@pytest.mark.slow
def test_trl_grpo(tmp_path: Path) -> None:
    python = os.environ.get("LATENT_CONTROL_TRL_PYTHON")
    if not python:
        pytest.skip("LATENT_CONTROL_TRL_PYTHON names no interpreter with TRL (see benchmarks/trl_grpo.py)")
    for case in run("trl_grpo", tmp_path, "--peer-python", python)["measured"].values():
        assert case["ours_mean_per_update"]["tokens_per_rollout"] == 4
        assert all(answer["tokens"] == 4 for answer in case["trl_rounds"])


@pytest.mark.slow
def test_off_policy(tmp_path: Path, tiny_checkpoint: Path, config) -> None:
    from configs.loading import dump_config

    shape = {
        "num_actions": 8,
        "policy_layers": 1,
        "inverse_dynamics_layers": 1,
        "merge_layers": 1,
        "init": str(tiny_checkpoint),
        "updates": 0,
    }
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(dump_config(config(actions=shape)))
    (tmp_path / "run" / "checkpoints" / "clone").symlink_to(tiny_checkpoint)
    content = run("off_policy", tmp_path, "--runs", str(tmp_path / "run"))
    assert [one["kind"] for one in content["repeats"]] == list(dict.fromkeys(row["policy"] for row in content["rows"]))
    assert all(one["estimates"].keys() == {"ips", "wis", "dr", "wdr"} for one in content["repeats"])


@pytest.mark.slow
def test_search(tmp_path: Path, tiny_checkpoint: Path, config) -> None:
    from configs.loading import dump_config
    from latent_control import LatentActionLM
    from latent_control.search.q_head import save_q_head
    from learners.q_head import QSettings
    from pipeline.stages.q_head import new_head
    from pipeline.storage import checkpoints

    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(
        dump_config(config(actions={"init": str(tiny_checkpoint), "updates": 0}))
    )
    (tmp_path / "run" / "checkpoints" / "clone").symlink_to(tiny_checkpoint)
    head = new_head(LatentActionLM.from_pretrained(tiny_checkpoint), QSettings(hidden=4), 0)
    checkpoints.write(tmp_path / "q", files=lambda folder: save_q_head(head, folder), info={})
    content = run(
        "search", tmp_path, "--runs", str(tmp_path / "run"), "--q", str(tmp_path / "q"), "--policies", "clone"
    )
    assert [(row["value"], row["method"]) for row in content["rows"]] == [
        (v, m) for v in ("verifier", "q") for m in ("mcts", "mcts-q")
    ]
    for one in content["repeats"]:
        tokens = {row["name"]: row["tokens_per_prompt"] for row in one["rows"]}
        assert tokens["best-of-n"] >= tokens[one["method"]]


@pytest.mark.slow
def test_explorer(tmp_path: Path) -> None:
    pytest.importorskip("playwright", reason="playwright is not installed")
    if "AXE_CORE" not in os.environ:
        pytest.skip("AXE_CORE does not name axe-core's axe.min.js (npm pack axe-core)")
    content = run("explorer", tmp_path)
    assert (
        [row["page"] for row in content["rows"]]
        == list(content["pages"])
        == ["64 codes", "128 codes", "128 codes, longest"]
    )
    assert all(row[kind] == 0 for row in content["rows"] for kind in ("axe", "console", "requests", "hostile"))
    assert all(len(page["times"]) == 2 for page in content["pages"].values())
