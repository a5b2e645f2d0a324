"""The engine that decodes nothing: right shapes, stated lengths and times, and nobody takes it for a real one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rl_tools import Config, host_of, make_learner, make_runner, sample, update

from configs.checks import cross_field_problems, simulation_warning
from configs.schema import RolloutConfig, RunConfig
from pipeline.cli.output import closing_words
from pipeline.console.displays import Display
from pipeline.preflight.check import check
from pipeline.rl.algorithm import LatentRL
from pipeline.run import execute
from pipeline.runs.context import StageResult
from pipeline.runs.stage_table import Stage
from pipeline.stages.play import evaluate
from rollout_workers.engines import DecodeJob, load_engine
from rollout_workers.engines.simulated import SimulatedEngine, read_options

pytest_plugins = ("rl_fixtures",)

FAST = {"engine": "simulated", "engine_options": {"tokens_per_second": 1e9}}


def engine(checkpoint: Path, level: str = "latent", **options: float) -> SimulatedEngine:
    settings = RolloutConfig(engine="simulated", engine_options={"tokens_per_second": 1e9, **options})
    found = load_engine(host_of(checkpoint, level), settings, device=torch.device("cpu"), policy_dtype=torch.float32)
    assert isinstance(found, SimulatedEngine)
    return found


def job(rows: int = 6, **changes: object) -> DecodeJob:
    return replace(
        DecodeJob(prompts=((3, 4, 5), (6, 7)), repeats=rows // 2, seeds=tuple(range(rows)), max_new_tokens=5), **changes
    )


def test_shapes_types_and_padding_are_those_of_a_real_generation(tiny_checkpoint: Path) -> None:
    made = engine(tiny_checkpoint).generate(job(keep_features=True))
    assert made.tokens.shape == made.actions.shape == made.action_logp.shape == made.versions.shape == (6, 5)
    assert (
        made.tokens.dtype == made.actions.dtype == made.versions.dtype == torch.int64
        and made.action_logp.dtype == torch.float32
    )
    assert made.lengths.tolist() == [5] * 6 and set(made.finish_reasons) == {"length"}
    assert made.actions.min() >= 0 and made.actions.max() < 8
    torch.testing.assert_close(made.action_logp, torch.full((6, 5), -math.log(8)))
    assert made.features is not None and [tuple(f.shape) for f in made.features] == [(7, 32)] * 3 + [(6, 32)] * 3
    assert made.features[0].dtype == torch.float32


def test_rows_that_stop_are_padded_after_the_end_token(tiny_checkpoint: Path) -> None:
    simulated = engine(tiny_checkpoint, mean_tokens=2.0)
    made = simulated.generate(job(200, seeds=tuple(range(200))))
    stopped = [row for row, reason in enumerate(made.finish_reasons) if reason == "stop"]
    assert 0 < len(stopped) < 200
    for row, length in enumerate(made.lengths.tolist()):
        for column in (made.actions[row], made.versions[row]):
            assert (column[length:] == -1).all() and (column[:length] >= 0).all()
        assert (made.action_logp[row, length:] == 0).all() and (made.action_logp[row, :length] < 0).all()
        assert row not in stopped or made.tokens[row, length - 1] == simulated.tokenizer.eos_token_id
        assert row in stopped or length == 5


def test_lengths_are_geometric_with_the_stated_mean(tiny_checkpoint: Path) -> None:
    made = engine(tiny_checkpoint, mean_tokens=20.0).generate(job(4000, seeds=tuple(range(4000)), max_new_tokens=400))
    lengths = made.lengths.double()
    # Standard error of the mean: sqrt(20 * 19 / 4000) = 0.31. Half of all are at most ln 2 / -ln(19 / 20) = 13.5 tokens
    # long.
    assert lengths.mean().item() == pytest.approx(20, abs=1.2)
    assert (lengths <= 13).double().mean().item() == pytest.approx(1 - 0.95**13, abs=0.03)


def test_a_rollout_depends_on_its_seed_alone(tiny_checkpoint: Path) -> None:
    simulated = engine(tiny_checkpoint, mean_tokens=4.0)
    together, alone = simulated.generate(job(seeds=(9, 8, 7, 6, 5, 4))), simulated.generate(job(2, seeds=(4, 7)))
    for ours, theirs in ((5, 0), (2, 1)):
        assert torch.equal(together.tokens[ours], alone.tokens[theirs]) and torch.equal(
            together.actions[ours], alone.actions[theirs]
        )


def test_at_token_level_an_action_is_the_token(tiny_checkpoint: Path) -> None:
    simulated = engine(tiny_checkpoint, level="token")
    made = simulated.generate(job())
    assert torch.equal(made.tokens, made.actions)
    torch.testing.assert_close(made.action_logp, torch.full((6, 5), -math.log(len(simulated.words))))


def test_it_takes_the_time_of_its_tokens(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    engine(tiny_checkpoint, tokens_per_second=120.0).generate(job())
    assert slept == [30 / 120]


def test_between_steps_it_asks_which_policy_is_in_force(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    versions = iter([3, 3, 4, 4, 5])
    made = engine(tiny_checkpoint, tokens_per_second=60.0).generate(job(refresh=lambda: next(versions)))
    assert made.versions.tolist() == [[3, 3, 4, 4, 5]] * 6
    assert sum(slept) == pytest.approx(30 / 60) and len(slept) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            r"rollout.engine_options.tokens_per_second: Field required; engine simulated takes tokens_per_second, "
            r"mean_tokens",
        ),
        ({"tokens_per_second": 0}, r"rollout.engine_options.tokens_per_second: .*greater than 0"),
        ({"tokens_per_second": 1, "mean": 2}, r"rollout.engine_options.mean: Extra"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_options(RolloutConfig(engine="simulated", engine_options=options))


def test_worker_and_learner_take_its_rollouts_as_any_others(config: Config, tiny_checkpoint: Path) -> None:
    run = config(rollout=FAST)
    runner, learner = make_runner(run, tiny_checkpoint), make_learner(run, tiny_checkpoint)
    rollouts = sample(runner, learner)
    assert {(r.world_hash, r.codebook_hash) for r in rollouts} == {("simulated", "simulated")}
    assert all(
        len(r) == 6 and r.reward is not None and r.features.shape == (len(r.prompt_tokens) + 5, 32) for r in rollouts
    )
    again = sample(make_runner(run, tiny_checkpoint), learner)
    assert [r.tokens.tolist() for r in rollouts] == [r.tokens.tolist() for r in again], "seeds decide"
    assert np.isfinite(update(learner, rollouts)["policy_loss"])


@pytest.mark.slow
def test_the_whole_loop_runs_on_it(algorithm: Callable[..., LatentRL], config: Config) -> None:
    rl = algorithm(config(rollout=FAST))
    result = rl.train()
    assert result["improve"]["tokens"] == 4 * 4 * 6 and rl.policy.version == 1


def test_nobody_takes_it_for_a_real_run(config: Config, tiny_base: Path, tmp_path: Path) -> None:
    run = config(rollout=FAST, evaluation=None)
    (warning,) = simulation_warning(run)
    assert warning.startswith("SIMULATED") and "NOISE" in warning
    assert warning in check(run).warnings
    assert not simulation_warning(config())
    idle = RunConfig(base={"model": str(tiny_base)}, improve=None, evaluation=None, rollout=FAST)
    assert not simulation_warning(idle), "nothing samples"


def test_a_run_on_it_says_so_in_its_summary(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = StageResult(checkpoint=tmp_path, metrics={})
    base = Stage(name="base", section="improve")
    monkeypatch.setattr("pipeline.run.plan", lambda *_: [base])
    monkeypatch.setattr("pipeline.run.work_of", lambda stage: lambda *_: done)
    execute(config(rollout=FAST, evaluation=None, tracking={"enabled": False}), tmp_path, Display())
    assert "SIMULATED" in closing_words(tmp_path)


def test_it_cannot_be_evaluated(config: Config) -> None:
    run = config(rollout=FAST)
    assert any("evaluation: rollout.engine is simulated" in problem for problem in cross_field_problems(run))
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(run, {}, prompts=4, say=print)


def test_wrong_options_are_found_before_anything_starts(config: Config) -> None:
    errors = check(config(rollout={"engine": "simulated"}, evaluation=None)).errors
    assert any(error.startswith("rollout.engine_options.tokens_per_second: Field required") for error in errors)
    errors = check(config(rollout={"engine_options": {"tokens_per_second": 3}})).errors
    assert any(error.startswith("rollout.engine_options: engine local takes none") for error in errors)
