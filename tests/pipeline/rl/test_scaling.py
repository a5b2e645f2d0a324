"""More and fewer rollout workers: the decision, the control file, who joins and who goes, and that results stay the
same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from fake_cluster import Ref
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError
from rl_tools import Config
from typer.testing import CliRunner

from configs.checks import cross_field_problems
from configs.schema import Autoscale, RunConfig
from pipeline.cli.main import app
from pipeline.rl import worker_group
from pipeline.rl.algorithm import LatentRL
from pipeline.rl.autoscale import Demand, next_demand
from pipeline.rl.rollout_pool import RolloutPool
from pipeline.rl.worker_group import Scaler, WorkerGroup
from pipeline.runs.control import read_request, write_request
from pipeline.runs.layout import CONFIG, CONTROL
from pipeline.stages.improve import update_metrics

pytest_plugins = ("rl_fixtures",)

# -- the decision ------------------------------------------------------------------------------------------------------


def after(shares: list[tuple[float, float]], workers: int = 2, **settings: Any) -> int:
    demand = Demand(workers=workers)
    for idle_learner, idle_workers in shares:
        demand = next_demand(
            demand, idle_learner, idle_workers, Autoscale(**{"min": 1, "max": 3, "patience": 2} | settings)
        )
    return demand.workers


LEARNER_WAITS, WORKERS_WAIT, NEITHER, BOTH = (0.9, 0.1), (0.1, 0.9), (0.4, 0.4), (0.8, 0.8)


@pytest.mark.parametrize(
    ("shares", "workers"),
    [
        ([LEARNER_WAITS], 2),  # once is nothing
        ([LEARNER_WAITS] * 2, 3),
        ([LEARNER_WAITS] * 9, 3),  # no more than max
        ([WORKERS_WAIT] * 2, 1),
        ([WORKERS_WAIT] * 9, 1),  # no fewer than min
        ([LEARNER_WAITS, NEITHER, LEARNER_WAITS], 2),  # not in a row
        ([LEARNER_WAITS, WORKERS_WAIT, LEARNER_WAITS, WORKERS_WAIT], 2),
        ([BOTH] * 4, 2),
        ([WORKERS_WAIT] * 2 + [LEARNER_WAITS] * 4, 3),
    ],
)
def test_one_step_at_a_time_after_enough_updates_in_a_row(shares: list[tuple[float, float]], workers: int) -> None:
    assert after(shares) == workers


@given(
    sampling=st.floats(0.01, 100.0), idle=st.floats(0.2, 0.8), margin=st.floats(0.01, 0.19), start=st.integers(1, 16)
)
def test_a_steady_load_settles(sampling: float, idle: float, margin: float, start: int) -> None:
    """Synchronous: the learner idles while ``sampling / workers`` seconds go by, the workers during the update's one
    second."""
    bound = 2 * (1 - idle) / (2 - idle)
    settings = Autoscale(min=1, max=16, learner_idle=idle, workers_idle=min(0.999, bound + margin), patience=1)
    demand, seen = Demand(workers=start), []
    for _ in range(40):
        share = sampling / demand.workers / (sampling / demand.workers + 1)
        demand = next_demand(demand, share, 1 - share, settings)
        seen.append(demand.workers)
    assert len(set(seen[20:])) == 1


def test_thresholds_that_would_go_to_and_fro_are_refused() -> None:
    def problems(**autoscale: Any) -> list[str]:
        config = RunConfig(
            base={"model": "x"}, evaluation=None, rollout={"num_workers": 2}, cluster={"autoscale": autoscale}
        )
        return [p for p in cross_field_problems(config) if "autoscale" in p]

    assert problems() == [] == problems(learner_idle=0.8, workers_idle=0.4)
    assert "set more than 0.67" in problems(workers_idle=0.6)[0]
    assert "cluster.autoscale allows 3 to 8" in problems(min=3)[0]


# -- the control file --------------------------------------------------------------------------------------------------


def test_control_file_is_read_as_written(tmp_path: Path) -> None:
    assert read_request(tmp_path) is None
    for workers in (3, None, 1):
        write_request(tmp_path, workers)
        assert read_request(tmp_path) == workers
    assert [p.name for p in tmp_path.iterdir()] == [CONTROL]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"rollout_workers": 0}', '{"rollout_workers": true}', '{"rollout_workers": "2"}', "{}x"]
)
def test_a_wrong_control_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / CONTROL).write_text(content)
    with pytest.raises(ValueError, match=r"control\.json.*latent-control scale"):
        read_request(tmp_path)


def test_scale_command_asks_running_runs_only(tmp_path: Path) -> None:
    def scale(*arguments: str) -> tuple[int, str]:

        done = CliRunner().invoke(app, ["scale", str(tmp_path), *arguments])
        return done.exit_code, done.output

    assert scale("--rollout-workers", "3")[0] == 2, "no run there"
    (tmp_path / CONFIG).write_text("")
    assert scale("--rollout-workers", "0")[0] == 2 == scale()[0] == scale("--auto", "--rollout-workers", "1")[0]
    assert read_request(tmp_path) is None
    assert scale("--rollout-workers", "3")[0] == 0 and read_request(tmp_path) == 3
    assert scale("--auto")[0] == 0 and read_request(tmp_path) is None
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "improve.json").write_text("{}")
    code, output = scale("--rollout-workers", "3")
    assert code == 2 and "finished its improve stage" in output


# -- who joins and who goes --------------------------------------------------------------------------------------------


class FakeGroup:
    """An ``EnvRunnerGroup`` of handles that are ``SimpleNamespace``s, and the ``ray`` module."""

    _env_creator = _remote_config_obj_ref = None
    _remote_args = {"num_cpus": 1, "num_gpus": 0}  # noqa: RUF012

    def __init__(self, workers: int) -> None:
        self.handles = {i: self._make_worker(worker_index=i) for i in range(1, workers + 1)}
        self.down: set[int] = set()
        self.killed: list[int] = []
        self.answers: list[Ref] = []
        self.next_id = workers
        self.remote = None

    @property
    def _worker_manager(self) -> FakeGroup:
        return self

    def num_remote_env_runners(self) -> int:
        return len(self.handles)

    def probe_unhealthy_env_runners(self) -> None:
        pass

    def actor_ids(self) -> list[int]:
        return list(self.handles)

    def healthy_actor_ids(self) -> list[int]:
        return [i for i in self.handles if i not in self.down]

    def remove_actor(self, worker: int) -> Any:
        return self.handles.pop(worker)

    def add_actors(self, actors: list[Any]) -> None:
        for actor in actors:
            self.next_id += 1
            self.handles[self.next_id] = actor

    def _make_worker(self, *, worker_index: int, **_: Any) -> Any:
        def ping() -> Ref:
            self.answers.append(Ref())
            return self.answers[-1]

        return SimpleNamespace(index=worker_index, ping=SimpleNamespace(remote=ping))

    def wait(self, refs: list[Ref], *, num_returns: int, timeout: float) -> tuple[list[Ref], list[Ref]]:
        return [r for r in refs if r.ready], [r for r in refs if not r.ready]

    def get(self, ref: Ref) -> Any:
        if ref.error is not None:
            raise ref.error

    def kill(self, actor: Any) -> None:
        self.killed.append(actor.index)

    def available_resources(self) -> dict[str, float]:
        return {"CPU": 0.5}


Made = tuple[WorkerGroup, FakeGroup, list[str], SimpleNamespace]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    group, said, clock = FakeGroup(2), [], SimpleNamespace(now=0.0)
    monkeypatch.setattr(worker_group, "ray", group)
    monkeypatch.setattr(worker_group, "time", SimpleNamespace(monotonic=lambda: clock.now))
    scalable = WorkerGroup(group, RolloutPool(group, timeout=60.0))
    scalable.say = said.append
    return scalable, group, said, clock


def test_a_new_worker_joins_once_it_is_up(made: Made) -> None:
    scalable, group, said, _ = made
    scalable.scale_to(4)
    scalable.admit()
    assert scalable.up == [1, 2] and scalable.size == 4 and said == ["rollout workers: 2 -> 4"]
    group.answers[1].ready = True
    scalable.admit()
    assert scalable.up == [1, 2, 3] and group.handles[3].index == 4 and scalable.size == 4
    scalable.scale_to(4)
    assert len(said) == 1


def test_no_room_is_said_once_and_room_that_appears_is_used(made: Made) -> None:
    scalable, group, said, clock = made
    scalable.scale_to(3)
    for clock.now in (1.0, 70.0, 80.0):
        scalable.admit()
    no_room = (
        "1 new rollout workers have not started yet, the run goes on with 2; each needs 1 CPUs and 0 GPUs, free "
        "are 0.5 and 0"
    )
    assert said[1:] == [no_room]
    group.answers[0].ready = True
    scalable.admit()
    assert scalable.up == [1, 2, 3]


def test_one_that_cannot_start_is_named_and_one_whose_node_went_is_awaited(made: Made) -> None:
    scalable, group, said, _ = made
    scalable.scale_to(4)
    for ref, failed in zip(group.answers, (True, False), strict=True):
        ref.error, ref.ready = ActorDiedError(), True
        ref.error._actor_init_failed = failed
    scalable.admit()
    assert len(said) == 2 and "could not start, the run goes on with 2" in said[1]
    assert list(scalable.joining) == group.answers[2:] and scalable.size == 3


def test_who_goes_first(made: Made) -> None:
    """One that is not there yet, then one that is down, then the youngest."""
    scalable, group, _, _ = made
    scalable.scale_to(4)
    group.answers[0].ready = True
    scalable.admit()
    group.down = {1}
    for workers in (3, 2, 1):
        scalable.scale_to(workers)
    assert group.killed == [4, 1, 3] and scalable.up == [2]
    scalable.scale_to(2)
    assert next(iter(scalable.joining.values())).index == 5, "no two workers ever have the same number"


def test_scaler_obeys_the_file_else_the_shares(made: Made, tmp_path: Path) -> None:
    scalable, group, said, _ = made
    config = RunConfig(base={"model": "x"}, rollout={"num_workers": 2}, cluster={"autoscale": {"patience": 1}})
    scaler = Scaler(config, tmp_path, scalable, said.append)
    busy = {"idle_learner": 0.9, "idle_workers": 0.0}
    scaler.before_update()
    assert said == []
    scaler.after_update(busy)
    scaler.before_update()
    assert scalable.size == 3
    scaler.after_update(busy)  # one is on its way: it may be enough
    scaler.before_update()
    assert scalable.size == 3
    group.answers[0].ready = True
    scalable.admit()
    write_request(tmp_path, 1)
    scaler.after_update(busy)
    scaler.before_update()
    assert scalable.size == 1
    (tmp_path / CONTROL).write_text("{")
    for _ in range(2):
        scaler.before_update()
    assert len([text for text in said if "JSON" in text]) == 1 and scalable.size == 1
    write_request(tmp_path, None)
    scaler.after_update(busy)
    scaler.before_update()
    assert scalable.size == 2, "left to itself it goes on from where it is"


# -- on real Ray -------------------------------------------------------------------------------------------------------


def settled(algorithm: LatentRL, workers: int) -> None:
    algorithm.worker_group.scale_to(workers)
    if algorithm.worker_group.joining:
        ray.wait(list(algorithm.worker_group.joining), num_returns=len(algorithm.worker_group.joining), timeout=300)
    algorithm.worker_group.admit()
    assert len(algorithm.worker_group.up) == workers


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_workers(algorithm: Callable[..., LatentRL], config: Config) -> None:
    """One worker throughout, and 1 -> 3 -> 2: the same rollouts, the same weights, to the last bit."""
    found = []
    for plan in ((1, 1, 1), (1, 3, 2)):
        autoscaled = algorithm(config(rollout={"num_workers": 1}, cluster={"autoscale": {"max": 3}}))
        metrics, sampling = [], []
        for workers in plan:
            settled(autoscaled, workers)
            metrics.append(update_metrics(autoscaled.train()))
            sampling.append(metrics[-1]["rollout_workers"])
        assert sampling == list(plan)
        found.append(([m["reward"] for m in metrics], autoscaled.weights))
    (rewards, weights), (others, their_weights) = found
    assert rewards == others and all(np.array_equal(weights[name], their_weights[name]) for name in weights)


@pytest.mark.slow
def test_a_worker_without_room_does_not_hold_up_the_run(
    algorithm: Callable[..., LatentRL], config: Config, tmp_path: Path
) -> None:
    """Four of the six CPUs are taken."""
    limited = algorithm(config(rollout={"num_workers": 1, "cpus_per_worker": 4}))
    said: list[str] = []
    write_request(tmp_path, 2)
    scaler = Scaler(limited.run_config, tmp_path, limited.worker_group, said.append)
    scaler.before_update()
    assert update_metrics(limited.train())["rollout_workers"] == 1 and limited.worker_group.size == 2
    limited.worker_group.asked -= 100
    scaler.before_update()
    assert "1 new rollout workers have not started yet, the run goes on with 1; each needs 4 CPUs" in said[-1]
    write_request(tmp_path, 1)
    scaler.before_update()
    assert limited.worker_group.size == 1
    limited.train()
