"""The plan of a cluster, by numbers that can be worked out in the head."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def planner(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("scaling_plan")


@pytest.fixture
def setting(planner: ModuleType) -> Any:
    """1 B weights in all, of which the policy is a quarter: 1 GB in float32. A row's caches take 1 MB at 500
    positions."""
    return planner.Setting(
        base_billions=0.5,
        policy_billions=0.25,
        merge_billions=0.25,
        width=1000,
        layers=10,
        cache_width=100,
        prompt_tokens=100,
        response_tokens=800,
        group=500,
        prompts=8,
        rows=1000,
        memory_tb=3.0,
        memory_share=0.5,
        matmul_tflops=27.0,
        matmul_share=0.5,
        gpus_per_node=4,
        network_gb=2.0,
        link_gb=4.0,
        driver_ms=0.25,
        publish_gb=0.5,
        load_gb=4.0,
    )


def test_a_step_reads_weights_and_caches(planner: ModuleType, setting: Any) -> None:
    # 2 GB of weights + 1000 rows x 1 MB at 1.5 TB/s: 2 ms for 1000 tokens
    assert planner.decode_rate(setting, 1000) == pytest.approx(500_000)
    # + 1 row: 2.001 GB, nearly all of it weights
    assert planner.decode_rate(setting, 1) == pytest.approx(1.5e12 / 2.001e9)


def test_a_stateless_policy_learns_from_responses_alone(planner: ModuleType, setting: Any) -> None:
    small = planner.replace(setting, stateless=1)
    # 6 x 0.25e9 x 800 positions = 1.2e12 at 13.5e12 FLOP/s
    assert planner.learn_rate(small) == pytest.approx(11.25)
    # 4,000 rollouts x 800 states x 1,000 x 2 bytes = 6.4 GB to one node at 2 GB/s, of 899 states before
    assert planner.plan(small, 4, 1)["seconds"]["network"] == pytest.approx(3.2)
    assert planner.plan(setting, 4, 1)["seconds"]["network"] == pytest.approx(3.596)
    # 1 GB loaded at 4 GB/s; in flight there are no caches of the policy to compute again
    assert planner.standstill(planner.replace(small, refresh=1), 4, 1000) == pytest.approx(0.25)


def test_learning_counts_the_base_only_where_it_runs(planner: ModuleType, setting: Any) -> None:
    # 6 x 0.25e9 x 900 positions = 1.35e12 at 13.5e12 FLOP/s; with the base 2 x 0.5e9 more per position
    assert planner.learn_rate(setting) == pytest.approx(10)
    assert planner.learn_rate(planner.with_values(setting, {"recompute": 1})) == pytest.approx(6)


def test_standstill_is_arrival_and_loading(planner: ModuleType, setting: Any) -> None:
    # 1 GB: loaded in 0.25 s, one hop takes 0.5 s; 1 + 3 nodes are two doublings
    assert planner.standstill(setting, 4, 108) == pytest.approx(0.25 + 0.5)
    assert planner.standstill(setting, 10, 108) == pytest.approx(0.25 + 2 * 0.5)
    # in flight no hop is waited for: 108 rows x 500 positions x 0.5e9 FLOP at 13.5e12 FLOP/s
    assert planner.standstill(planner.with_values(setting, {"refresh": 1}), 10, 108) == pytest.approx(0.25 + 2)


def test_one_split_by_hand(planner: ModuleType, setting: Any) -> None:
    found = planner.plan(setting, workers=4, learners=2)
    assert (found["rows"], found["busy"]) == (1000, 4)  # 4,000 rollouts in 4 requests
    assert found["seconds"] == pytest.approx(
        {
            "workers": 4000 * 800 / (4 * 500_000) + 0.75,
            "learners": 4000 / (2 * 10) + 2 * 1 / 4 / 2 + 1 / 0.5,
            "network": 4000 * 899 * 1000 * 2 / 2e9,
            "driver": 4000 * 0.25e-3 + 1 / 0.5,
        }
    )
    assert found["limit"] == "learners"
    assert found["rollouts_per_second"] == pytest.approx(4000 / 202.25)
    assert planner.plan(planner.with_values(setting, {"recompute": 1}), 4, 2)["seconds"]["network"] == 0


def test_more_workers_than_prompts_stand_idle(planner: ModuleType, setting: Any) -> None:
    found = planner.plan(setting, workers=20, learners=1)
    assert (found["rows"], found["busy"]) == (500, 16)  # 8 requests of a prompt each, twice as many open
    assert planner.plan(planner.with_values(setting, {"staleness": 3}), 20, 1)["busy"] == 20


def test_best_split_is_the_fastest_of_those_that_divide_the_prompts(planner: ModuleType, setting: Any) -> None:
    rates = {
        learners: planner.plan(setting, 12 - learners, learners)["rollouts_per_second"] for learners in (1, 2, 4, 8)
    }
    found = planner.best(setting, 12)
    assert rates[found["learners"]] == found["rollouts_per_second"] == max(rates.values())
    assert found["workers"] + found["learners"] == 12


def test_measured_values_take_the_place_of_assumed_ones(planner: ModuleType, setting: Any, tmp_path: Path) -> None:
    assert planner.measured(tmp_path) == {}
    runs = [
        {"workers": workers, "windows": [{"main_thread_ms": ms} for ms in times]}
        for workers, times in ((8, [9]), (256, [1, 5, 2]))
    ]
    (tmp_path / "scaling.json").write_text(json.dumps({"measured": runs}))
    (tmp_path / "publish.json").write_text(json.dumps({"setting": {"publish_gb": 3.0, "load_gb": 4.0}}))
    found = planner.measured(tmp_path)
    assert found == {"driver_ms": 2, "publish_gb": 3, "load_gb": 4}
    assert planner.with_values(setting, {**found, "rows": "64"}).rows == 64
    with pytest.raises(ValueError, match="row: no such field; there are base_billions"):
        planner.with_values(setting, {"row": "64"})
