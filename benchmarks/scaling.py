"""What the driver pays per rollout as the number of rollout workers grows.

    python benchmarks/scaling.py [--workers 1 8 64 256] [--real 1 8] [--seconds 4] [--repeats 5] [--quick] [--out DIR]

``LatentRL.train()`` in asynchronous mode, staleness at most 1. Each worker answers a request of 16 rollouts about every
``--seconds``, and an update takes one request per worker: load and batch grow with the workers, updates/s stay. A new
driver and a new private Ray for each number of workers. Measured is the driver's process alone: CPU of all its threads;
CPU of its main thread, what it does while it does not wait, whose inverse is the rate at which one driver is saturated;
memory; bytes per rollout. Besides it, CPU of Ray's GCS (one per cluster) and raylet (one per node).

Real: ``LatentRL`` with pool, schedule, metrics, hash checks and publishing; Ray's actors, calls and objects; the
records. Left out: learner (its update returns at once) and replay buffer, which work in processes of their own.
``LMEnvRunner``: the real worker on the simulated engine. 256 of them need 0.4 GB each, hence ``stand-in``: one Ray
process per worker without torch and RLlib (0.07 GB), which fetches each policy version and, after the same time,
returns the records and metrics that a real worker made. The rows with the same number of both show how far the driver
can tell them apart. 256 need 20 GB; on two cores, starting them takes eight minutes.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import replace
from operator import methodcaller
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import ray
import torch
from common import ROOT, arguments, ratio, report, short, spread
from models import endless
from ray import cloudpickle
from ray._private.internal_api import node_stats
from ray.experimental import get_object_locations

from configs.schema import RunConfig
from latent_control.pretrained import base_path
from pipeline.cluster.connect import connected
from pipeline.rl.config import algorithm_config
from rollout_workers.rollouts import HostSpec, RolloutRequest

ACTIONS, GROUP, PROMPTS, TOKENS, ANSWERS = 64, 8, 2, 48, 16
KINDS = {"real": "LMEnvRunner", "light": "stand-in"}


def request(number: int, **settings: Any) -> RolloutRequest:
    """Groups of rollouts of a few prompts."""
    return RolloutRequest(
        request_id=number,
        split="train",
        prompt_indices=tuple(range(PROMPTS)),
        seeds=(number,) * PROMPTS,
        group_size=GROUP,
        **settings,
    )


class StandIn:
    """A worker to the driver: takes the same calls, returns what a real one made, and needs no torch."""

    def __init__(self, made: bytes, tokens_per_second: float, number: int) -> None:
        self.answers = [(rollouts, summary, Sealed(metrics)) for rollouts, summary, metrics in cloudpickle.loads(made)]
        self.tokens_per_second, self.number, self.version = tokens_per_second, number, -1
        self.chance = random.Random(number)

    def ping(self) -> str:
        """RLlib's question whether it lives."""
        return "pong"

    def apply(self, function: Any) -> Any:
        """As ``LMEnvRunner``."""
        return function(self)

    def sample_request(self, asked: RolloutRequest) -> Any:
        """One of the answers after its time, under the request's number and policy version."""
        policy = asked.policy
        assert policy is not None
        if policy.version != self.version:
            ray.get(policy.weights)
            self.version = policy.version
        rollouts, summary, metrics = self.chance.choice(self.answers)
        time.sleep(summary.tokens / self.tokens_per_second)
        stamp = {"policy_version": policy.version, "policy_hash": policy.weights_hash, "worker": self.number}
        policies = ((policy.version, policy.weights_hash, summary.tokens),)
        summary = replace(summary, request_id=asked.request_id, worker=self.number, policies=policies)
        return [replace(r, **stamp) for r in rollouts], (summary, metrics)


class Sealed:
    """Opens where it arrives: RLlib's metrics would bring RLlib and torch along into a stand-in."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __reduce__(self) -> Any:
        return cloudpickle.loads, (self.content,)


def put_stand_ins(algorithm: Any, workers: int, tokens_per_second: float) -> None:
    """Stand-ins in place of the algorithm's one real worker, which makes their answers first."""
    manager = algorithm.env_runner_group._worker_manager
    (real,) = manager.actors().values()
    requests = [request(i, policy=algorithm.policy, ship_features=True) for i in range(ANSWERS)]
    made = ray.get([real.apply.remote(methodcaller("sample_request", asked)) for asked in requests])
    answers = ray.put(
        cloudpickle.dumps([(rollouts, summary, cloudpickle.dumps(metrics)) for rollouts, (summary, metrics) in made])
    )
    kind = ray.remote(num_cpus=0)(StandIn)
    actors = [kind.remote(answers, tokens_per_second, number) for number in range(1, workers + 1)]
    ray.get([actor.ping.remote() for actor in actors])
    manager.remove_actor(next(iter(manager.actor_ids())))
    manager.add_actors(actors)


class Learner:
    """Stands for the learner group's update: only measures what it is given."""

    def __init__(self) -> None:
        self.bytes = self.answers = 0

    def __call__(self, *, training_data: Any, **_: Any) -> list[Any]:
        """Sizes of the objects; nothing is learned."""
        places = get_object_locations(training_data.episodes_refs)
        self.bytes += sum(place["object_size"] for place in places.values())
        self.answers += len(places)
        return []


def seconds_of_ray() -> dict[str, float]:
    """CPU seconds so far of this driver's GCS and raylet."""
    found = {"gcs_server": 0.0, "raylet": 0.0}
    for child in psutil.Process().children():
        if child.name() in found:
            times = child.cpu_times()
            found[child.name()] += times.user + times.system
    return found


def store_bytes() -> int:
    """What lies in this node's object store now."""
    (node,) = ray.nodes()
    return node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats.object_store_bytes_used


def measure(kind: str, workers: int, seconds: float, updates: int, repeats: int) -> dict[str, Any]:
    """Costs per rollout in each of ``repeats`` windows of ``updates`` updates, with this number of workers."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = endless(Path(folder))
        rate = PROMPTS * GROUP * TOKENS / 2 / seconds
        config = RunConfig(
            base={"model": base_path(checkpoint)},
            improve={
                "mode": "async",
                "max_staleness": 1,
                "prompts_per_update": PROMPTS * workers,
                "group_size": GROUP,
                "features": "ship",
            },
            rollout={
                "engine": "simulated",
                # The one worker that makes the stand-ins' answers need not take the time they take.
                "engine_options": {"tokens_per_second": rate if kind == "real" else 1e6, "mean_tokens": TOKENS / 2},
                "num_workers": workers,
                "max_new_tokens": TOKENS,
            },
        )
        host = HostSpec(level="latent", checkpoint=str(checkpoint))
        rllib = algorithm_config(config, host, num_actions=ACTIONS, reads="late", late_blocks=2, learning_rate=1e-3)
        with connected(config):
            torch.set_num_threads(1)
            algorithm = rllib.env_runners(num_env_runners=workers if kind == "real" else 1).build_algo()
            if kind == "light":
                put_stand_ins(algorithm, workers, rate)
            algorithm.learner_group.update = learner = Learner()
            for _ in range(2):
                algorithm.train()
            windows = [window(algorithm, learner, updates) for _ in range(repeats)]
            manager = algorithm.env_runner_group._worker_manager
            for worker in manager.actor_ids():  # they need no goodbye; a stand-in would not understand RLlib's
                manager.remove_actor(worker)
            algorithm.stop()
    return {"kind": kind, "workers": workers, "rollouts_per_request": PROMPTS * GROUP, "windows": windows}


def window(algorithm: Any, learner: Learner, updates: int) -> dict[str, float]:
    """``updates`` updates: costs per rollout in milliseconds of CPU, sizes in bytes."""
    learner.bytes = learner.answers = 0
    before = (time.perf_counter(), time.process_time(), time.thread_time(), seconds_of_ray())
    for _ in range(updates):
        algorithm.train()
    wall, cpu, main = (
        after - b
        for after, b in zip((time.perf_counter(), time.process_time(), time.thread_time()), before, strict=False)
    )
    rays = {name: after - before[3][name] for name, after in seconds_of_ray().items()}
    rollouts = learner.answers * PROMPTS * GROUP
    return {
        "rollouts_per_second": rollouts / wall,
        "driver_ms": 1e3 * cpu / rollouts,
        "main_thread_ms": 1e3 * main / rollouts,
        "gcs_ms": 1e3 * rays["gcs_server"] / rollouts,
        "raylet_ms": 1e3 * rays["raylet"] / rollouts,
        "bytes": learner.bytes / rollouts,
        "store_mb": store_bytes() / 1e6,
        "driver_mb": psutil.Process().memory_info().rss / 1e6,
    }


def in_own_process(kind: str, workers: int, options: Namespace) -> dict[str, Any]:
    """``measure``, in a new process."""
    command = [sys.executable, __file__, "--one", kind, str(workers), "--seconds", str(options.seconds)]
    command += ["--updates", str(options.updates), "--repeats", str(options.repeats)]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def values(measured: dict[str, Any], name: str) -> list[float]:
    """One measure over the windows."""
    return [window[name] for window in measured["windows"]]


def line(measured: dict[str, Any], base: dict[str, Any] | None) -> dict[str, str]:
    """A row of the table; ``base`` is what the driver's cost is compared with."""
    middle = {name: median(values(measured, name)) for name in measured["windows"][0]}
    return {
        "workers": f"{measured['workers']} {KINDS[measured['kind']]}",
        "rollouts/s": short(middle["rollouts_per_second"]),
        "driver, ms CPU / rollout": spread(values(measured, "driver_ms")),
        "against 8": spread(list(ratio(values(measured, "driver_ms"), values(base, "driver_ms")).values()))
        if base
        else "",
        "main thread, ms": spread(values(measured, "main_thread_ms")),
        "saturated at, rollouts/s": short(1e3 / middle["main_thread_ms"]),
        "GCS / raylet, ms": f"{short(middle['gcs_ms'])} / {short(middle['raylet_ms'])}",
        "KB / rollout": short(middle["bytes"] / 1e3),
        "store, MB": short(middle["store_mb"]),
        "driver, MB": short(middle["driver_mb"]),
    }


def main() -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--workers", nargs="*", type=int, default=[1, 8, 64, 256], help="numbers of stand-ins")
    parser.add_argument(
        "--real", nargs="*", type=int, default=[1, 8], help="numbers of LMEnvRunner actors on the simulated engine"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="mean time of a request")
    parser.add_argument("--updates", type=int, default=3, help="updates per window")
    parser.add_argument(
        "--one", nargs=2, metavar=("KIND", "WORKERS"), help="only this one, as JSON (used by the script itself)"
    )
    options = parser.parse_args()
    if options.one:
        kind, workers = options.one
        print(json.dumps(measure(kind, int(workers), options.seconds, options.updates, options.repeats)))
        return
    if options.quick:
        options.workers, options.real, options.seconds, options.updates = [1, 2], [1], 0.2, 1
    found: list[dict[str, Any]] = []
    for kind, counts in (("real", options.real), ("light", options.workers)):
        for workers in counts:
            found.append(in_own_process(kind, workers, options))
            base = next((m for m in found if (m["kind"], m["workers"]) == ("light", 8)), None)
            # Written after each, so that a machine too small for the last one loses that one only.
            data = {"seconds_per_request": options.seconds, "measured": found}
            report("scaling", [line(m, base) for m in found], data, options.out)


if __name__ == "__main__":
    main()
