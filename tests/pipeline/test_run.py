"""Whole runs through the command line: they learn, leave what they promise, survive kill -9 and close the offline
loop."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from run_fixtures import QUICKSTART, ROOT, call, command
from safetensors.torch import load_file

from pipeline.integrity.audit import audit

pytest_plugins = ("run_fixtures",)
# One thread everywhere: tests share their two cores.
SMALL = [
    "actions.updates=20",
    "clone.updates=20",
    "evaluation.prompts=16",
    "evaluation.marginal_sequences=16",
    "cluster.learner_threads=1",
]
SMALL += [
    "actions.evaluation_sequences=32",
    "clone.evaluation_sequences=32",
    "actions.min_alive_share=0",
    "rollout.num_workers=2",
]
SMALL += ["explorer.enabled=false"]
TINY_RL = ["improve.prompts_per_update=4", "improve.group_size=4"]


def metrics(run_dir: Path, stage: str) -> list[dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["stage"] == stage]


@pytest.mark.slow
def test_reinforcement_learning_raises_success(learned: Path) -> None:
    evaluation = json.loads((learned / "summary.json").read_text())["evaluation"]
    assert evaluation["improved"]["sampled"] > evaluation["cloned"]["sampled"] + 0.1
    assert evaluation["differences"]["improved - cloned"]["sampled"]["low"] > 0


@pytest.mark.slow
def test_codes_explain_the_next_token(learned: Path) -> None:
    last = [record for record in metrics(learned, "actions") if "nll_codes" in record][-1]
    assert last["nll_codes"] < 0.5 * last["nll_base"]
    assert last["inverse_dynamics_alive_share"] > 0.5


def test_run_folder_holds_what_the_readme_says(small_run: Path) -> None:
    summary = json.loads((small_run / "summary.json").read_text())
    assert list(summary["stages"]) == ["actions", "clone", "improve"]
    assert all(
        (small_run / stage["checkpoint"]).is_dir() and stage["seconds"] > 0 for stage in summary["stages"].values()
    )
    assert {"base", "cloned", "improved"} <= summary["evaluation"].keys() and summary["evaluation"]["prompts"] == 32
    assert (small_run / "config.yaml").is_file()
    tracked = json.loads((small_run / "mlflow.json").read_text())["runs"]
    assert set(tracked) == {"actions", "clone", "improve", "evaluate"}
    assert [record["step"] for record in metrics(small_run, "improve")] == list(range(1, 7))


def test_every_rollout_is_in_the_replay_buffer_once(small_run: Path) -> None:
    rollouts = pd.read_parquet(small_run / "replay")
    assert len(rollouts) == 6 * 16 * 8
    assert rollouts.rollout_id.is_unique
    assert sorted(rollouts.policy_version.unique()) == list(range(6))
    logged = {record["step"] - 1: record["reward"] for record in metrics(small_run, "improve")}
    stored = rollouts.groupby("policy_version").reward.mean()
    assert all(abs(stored[version] - reward) < 1e-6 for version, reward in logged.items())


def test_audit_counts_what_a_whole_run_consumed(small_run: Path) -> None:
    """Damage of every kind: ``tests/foreign/test_audit.py``."""
    findings = audit(small_run)
    assert all(one.passed for one in findings)
    answers = {one.question: one.answer for one in findings}
    assert list(answers) == [
        *("files", "hashes", "ledger", "prompts", "rollouts", "staleness"),
        *("policies", "codebook", "metrics", "leftovers", "tracking"),
    ]
    assert "96 consumed, each once" in answers["prompts"] and "768 consumed once" in answers["rollouts"]


def test_worker_and_learner_agree_on_log_probabilities(small_run: Path) -> None:
    assert max(record["logp_gap"] for record in metrics(small_run, "improve")) < 1e-4


@pytest.mark.slow
def test_checkpoint_is_evaluated_on_its_own(learned: Path) -> None:
    result = json.loads(call("evaluate", str(learned / "checkpoints" / "improve"), "--prompts", "128", "--json"))
    whole = json.loads((learned / "summary.json").read_text())["evaluation"]
    assert result["improve"]["greedy"] == whole["improved"]["greedy"]
    assert result["improve"]["sampled"] == whole["improved"]["sampled"]


@pytest.mark.slow
def test_latent_actions_are_found_again_on_the_replay_buffer(learned: Path, tmp_path: Path) -> None:
    source = f"[{{kind: replay, path: {learned}, min_reward: 1.0}}]"
    again = [
        "improve=null",
        f"actions.init={learned / 'checkpoints' / 'improve'}",
        f"actions.data={source}",
        f"clone.data={source}",
    ]
    again += ["evaluation=null"]
    call("run", QUICKSTART, *SMALL, *again, "--run-dir", str(tmp_path / "again"))
    before, after = (
        load_file(folder / "latent_actions.safetensors")
        for folder in (learned / "checkpoints/improve", tmp_path / "again/checkpoints/actions")
    )
    assert torch.equal(before["policy.head.weight"], after["policy.head.weight"])
    assert not torch.equal(before["codebook"], after["codebook"])
    first, last = metrics(tmp_path / "again", "actions")[0], metrics(tmp_path / "again", "actions")[-1]
    assert last["nll_codes"] < last["nll_base"] and first["loss"] > last["loss"] - 1.0


@pytest.mark.slow
def test_evaluation_in_full_with_gates(tmp_path: Path) -> None:
    """Every measure, the stored outcomes, the held-out curve, and exit code 3 with all of it written."""
    run_dir = tmp_path / "gated"
    measures = ["evaluation.samples_per_prompt=4", "evaluation.pass_at=[1, 4]", "evaluation.slices=[target, numbers]"]
    measures += ["evaluation.slice_minimum=2", f"evaluation.embedder={ROOT / 'configs/models/countdown-1m'}"]
    curve = ["improve.updates=3", "improve.evaluate_every=2", "improve.evaluate_prompts=8"]
    gates = "gates=['base.greedy >= 0', 'success >= 2']"
    done = subprocess.run(
        command("run", QUICKSTART, *SMALL, *TINY_RL, *measures, *curve, gates, "--run-dir", str(run_dir)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 3, done.stderr[-3000:]
    assert "gate FAILED: success >= 2  (improved: " in done.stderr and "gate passed: base.greedy >= 0" in done.stdout
    summary = json.loads((run_dir / "summary.json").read_text())
    assert [v["passed"] for v in summary["gates"]["verdicts"]] == [True, False] and not summary["gates"]["passed"]
    rows = pd.read_parquet(run_dir / "evaluation.parquet")
    for name in ("base", "cloned", "improved"):
        found, own = summary["evaluation"][name], rows[rows.variant == name]
        sampled = own[own["mode"] == "sampled"]
        assert (
            len(sampled) == 64
            and sorted(sampled["sample"].unique()) == [0, 1, 2, 3]
            and (own["mode"] == "greedy").sum() == 16
        )
        solved = sampled.groupby("prompt_id").success
        assert found["pass_at_1"] == pytest.approx(found["sampled"]) and found["sampled"] == pytest.approx(
            solved.mean().mean()
        )
        assert found["pass_at_4"] == pytest.approx(solved.max().mean())
        assert sum(s["prompts"] for s in found["slices"]["target"].values()) == 16 and list(
            found["slices"]["numbers"]
        ) == ["length 3"]
        assert found["semantic_diversity"] >= 1.0 - 1e-6 and 0 < found["distinct_2"] <= 1
        assert found["sampled_tokens"] == pytest.approx(sampled.new_tokens.mean())
    evaluation = summary["evaluation"]
    assert evaluation["base"]["nll_rise"] == 0 < evaluation["cloned"]["kl_to_base"]
    assert 1 <= evaluation["improved"]["policy_code_perplexity"] <= 64 and 0 <= evaluation["improved"]["coverage"] <= 1
    assert evaluation["improved"]["cost_tokens"] == pd.read_parquet(run_dir / "replay").length.sum()
    assert (
        evaluation["improved"]["cost_seconds"]
        > evaluation["cloned"]["cost_seconds"]
        > evaluation["base"]["cost_seconds"]
        == 0
    )
    lines = metrics(run_dir, "improve")
    assert [r["step"] for r in lines if "heldout_success" in r] == [2, 3]
    first = rows[(rows.variant == "improved") & (rows["mode"] == "sampled") & (rows["sample"] == 0)][:8]
    assert lines[-1]["heldout_success"] == first.success.mean(), (
        "the last play is the final evaluation's first prompts, to the draw"
    )
    again = subprocess.run(
        command("evaluate", str(run_dir / "checkpoints/improve"), "--prompts", "8", "--json"),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 3
    assert json.loads(again.stdout)["gates"]["verdicts"][1]["variant"] == "improve"
    assert json.loads(again.stdout)["improve"]["nll"] == evaluation["improved"]["nll"]


@pytest.mark.slow
def test_replay_buffer_alone_improves_the_policy_and_judges_it(learned: Path, tmp_path: Path) -> None:
    config = str(ROOT / "configs" / "improve_offline.yaml")
    paths = [
        f"actions.init={learned / 'checkpoints/clone'}",
        f"improve_offline.data=[{{kind: replay, path: {learned}}}]",
    ]
    short = ["improve_offline.updates=150", "evaluation.prompts=256", "cluster.learner_threads=1"]
    call("run", config, *paths, *short, "--run-dir", str(tmp_path / "offline"))
    evaluation = json.loads((tmp_path / "offline" / "summary.json").read_text())["evaluation"]
    assert evaluation["differences"]["offline - cloned"]["sampled"]["low"] > 0
    judged = json.loads(call("off-policy", str(tmp_path / "offline"), "--replay", str(learned), "--json"))
    assert judged["checkpoint"] == "improve_offline" and 0 < judged["report"]["prompts"] < 0.3 * 30 * 16
    # What reinforcement learning was trained on says nothing about it.
    assert json.loads(call("off-policy", str(learned), "--replay", str(learned), "--json"))["verdict"] == "unknown"


def ended(run_dir: Path, arguments: list[str], stage: str, step: int, number: int) -> tuple[int, float, str]:
    """Start (or continue) a run and send it a signal once ``stage`` has logged ``step``: (exit code, seconds until
    then, what it said)."""
    start = (
        ["resume", str(run_dir)]
        if (run_dir / "config.yaml").is_file()
        else ["run", QUICKSTART, *arguments, "--run-dir", str(run_dir)]
    )
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); sys.argv = "
        f"{['latent-control', *start]!r}\n"
    )
    code += "from pipeline.cli.main import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 300
        while not ((run_dir / "metrics.jsonl").is_file() and any(r["step"] >= step for r in metrics(run_dir, stage))):
            assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be stopped"
            time.sleep(0.05)
        process.send_signal(number)
        asked = time.monotonic()
        _, words = process.communicate(timeout=120)
    return process.returncode, time.monotonic() - asked, words


ENDS = [
    ("clone", 5, signal.SIGINT, 130),
    ("improve", 2, signal.SIGTERM, 0),
    ("improve", 9, signal.SIGKILL, -signal.SIGKILL),
]


@pytest.mark.slow
def test_stopped_or_killed_and_resumed_run_equals_the_undisturbed_one(tmp_path: Path) -> None:
    """Nothing is done twice, and the end is the same, bit for bit."""
    arguments = [
        *SMALL,
        *TINY_RL,
        "improve.updates=14",
        "improve.checkpoint_every=4",
        "clone.checkpoint_every=100",
        "evaluation=null",
    ]
    broken = tmp_path / "broken"
    for stage, step, number, expected in ENDS:
        code, seconds, words = ended(broken, arguments, stage, step, number)
        assert code == expected and seconds < 10
        if number != signal.SIGKILL:
            assert f"continue with: latent-control resume {broken}" in words
            saved = max((broken / "checkpoints").glob(f"{stage}-*"))
            assert int(saved.name.split("-")[1]) == metrics(broken, stage)[-1]["step"] >= step
    call("resume", str(broken))
    call("run", QUICKSTART, *arguments, "--run-dir", str(tmp_path / "whole"))
    found, whole = (
        load_file(tmp_path / name / "checkpoints/improve/latent_actions.safetensors") for name in ("broken", "whole")
    )
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    assert [r["step"] for r in metrics(broken, "improve")] == list(range(1, 15))
    assert [r["step"] for r in metrics(broken, "clone")] == list(range(1, 21))
    assert [r["reward"] for r in metrics(broken, "improve")] == [
        r["reward"] for r in metrics(tmp_path / "whole", "improve")
    ]
    rollouts = pd.read_parquet(broken / "replay")
    assert rollouts.rollout_id.is_unique and len(rollouts) == 14 * 16
    assert all(one.passed for one in audit(broken))


@pytest.mark.slow
def test_fine_tuning_and_token_level_baseline_run(tmp_path: Path) -> None:
    arguments = [
        *SMALL,
        *TINY_RL,
        "finetune={codes: inverse_dynamics, updates: 5}",
        "improve.updates=2",
        "improve.token_baseline=true",
        "improve.mode=async",
    ]
    call("run", QUICKSTART, *arguments, "--run-dir", str(tmp_path / "all"))
    summary = json.loads((tmp_path / "all" / "summary.json").read_text())
    assert list(summary["stages"]) == ["actions", "clone", "token_sft", "finetune", "reclone", "token_level", "improve"]
    assert {"base", "cloned", "finetuned", "improved", "token_sft", "token_level"} <= summary["evaluation"].keys()


@pytest.mark.slow
def test_shrunken_llama_config_runs(tmp_path: Path) -> None:
    """The paper's config, with a tiny Llama in place of Llama-3.1-8B and everything made small by overrides."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    base = tmp_path / "tiny-llama"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ROOT / "configs/models/countdown-1m")
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 9,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2, **shape)
    ).save_pretrained(base)
    tokenizer.save_pretrained(base)
    offline = [
        f"{s}.{k}"
        for s in ("actions", "clone", "finetune")
        for k in (
            "updates=2",
            "batch_size=4",
            "num_workers=1",
            "gpus_per_worker=0",
            "mixed_precision=no",
            "evaluation_sequences=4",
        )
    ]
    other = [
        "task.name=countdown",
        f"base.model={base}",
        "base.dtype=float32",
        "cluster.address=local",
        "cluster.gpus_per_learner=0",
        "cluster.num_learners=0",
    ]
    rollout = [
        "rollout.num_workers=1",
        "rollout.gpus_per_worker=0",
        "rollout.cpus_per_worker=1",
        "rollout.torch_threads=1",
        "rollout.max_new_tokens=8",
    ]
    rl = [
        "improve.updates=1",
        "improve.prompts_per_update=2",
        "improve.mixed_precision=no",
        "evaluation.prompts=4",
        "evaluation.marginal_sequences=4",
        "actions.min_alive_share=0",
    ]
    call(
        "run",
        str(ROOT / "configs/llama31_8b_math.yaml"),
        *offline,
        *other,
        *rollout,
        *rl,
        "--run-dir",
        str(tmp_path / "run"),
    )
    assert "improved" in json.loads((tmp_path / "run" / "summary.json").read_text())["evaluation"]


@pytest.mark.slow
def test_one_worker_two_workers_and_two_shards_take_the_same_steps(tmp_path: Path) -> None:
    """Stage ``clone`` has no noise, so the same global batches must give the same losses and gradients however they are
    split."""
    short = [
        "actions.updates=0",
        "clone.updates=4",
        "clone.checkpoint_every=2",
        "clone.evaluate_every=4",
        "improve=null",
        "evaluation=null",
    ]
    kinds = {"one": [], "two": ["clone.num_workers=2"], "shards": ["clone.num_workers=2", "clone.shard=true"]}
    curves = {}
    for name, extra in kinds.items():
        call("run", QUICKSTART, *SMALL, *short, *extra, "--run-dir", str(tmp_path / name))
        curves[name] = [(r["loss"], r["gradient_norm"]) for r in metrics(tmp_path / name, "clone")]
    weights = {name: load_file(tmp_path / name / "checkpoints/clone/latent_actions.safetensors") for name in kinds}
    for name in ("two", "shards"):
        torch.testing.assert_close(torch.tensor(curves[name]), torch.tensor(curves["one"]), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(weights[name], weights["one"], rtol=1e-3, atol=1e-5)
