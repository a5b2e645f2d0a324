"""Workers against throughput, and what the driver pays per rollout as their number grows.

    python benchmarks/scaling.py [--parts real driver publish] [--workers 1 8 64 256] [--real 1 8] [--repeats 5] [--quick] [--out DIR]

``real``: tokens/s of one and of two rollout workers (LMEnvRunner actors with one thread each, 0.9 M-parameter base LM, 128 rollouts
of 48 tokens per request), alternating; no learner, and the driver only waits. Needs two free cores.

``driver``: ``LatentRL.train()`` in asynchronous mode, staleness at most 1, each worker answering a request of 16 rollouts about every
``--seconds``, so the driver's load grows with the workers. A new driver and a new private Ray for each number of workers. Measured is
the driver's process alone: CPU of all its threads, CPU of its main thread (what it does while it does not wait: its inverse is the
rate at which one driver is saturated), memory, and bytes per rollout; besides it, CPU of Ray's GCS (one per cluster) and raylet (one
per node). Real: ``LatentRL`` with pool, scheduler, metrics, hash checks and publishing; Ray's actors, calls and objects; the records.
Left out: learner (its update returns at once) and replay buffer, which work in processes of their own. ``LMEnvRunner``: the real
worker on the simulated engine. 256 of them do not fit (0.4 GB each), hence ``stand-in``: one Ray process per worker without torch and
RLlib, which fetches each policy version and, after the same time, returns the records and metrics that a real worker made. The rows
with the same number of both show that the driver cannot tell them apart.

``publish``: GB/s of what a new policy version costs, on one thread: the driver copies, hashes and stores its float32 weights
(``publish``), each worker hashes them and copies them into its module (``load``).
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from operator import methodcaller
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from common import ROOT, alternate, arguments, ratio, report, short, spread
from models import endless
from ray import cloudpickle
from ray._private.internal_api import node_stats
from ray.experimental import get_object_locations
from ray.rllib.env.env_runner_group import EnvRunnerGroup

from configs.schema import RunConfig
from latent_control.persistence import array_hash, base_path
from pipeline.algorithm import algorithm_config, workers_config
from pipeline.cluster import connected
from pipeline.pool import RolloutPool
from rollout_workers.episodes import HostSpec, RolloutRequest
from rollout_workers.hosting import WorkerSettings

ACTIONS, GROUP, PROMPTS, TOKENS, ANSWERS = 64, 8, 2, 48, 16
KINDS = {"real": "LMEnvRunner", "light": "stand-in"}


# -- real workers -------------------------------------------------------------------------------------------------------------


def request(number: int, prompts: int, **settings: Any) -> RolloutRequest:
    """Groups of rollouts of ``prompts`` prompts."""
    indices = tuple(range(number, number + prompts))
    return RolloutRequest(
        request_id=number, split="train", prompt_indices=indices, seeds=(number,) * prompts, group_size=GROUP, **settings
    )


def real_workers(checkpoint: Path, *, prompts: int, requests: int, repeats: int) -> dict[str, list[float]]:
    """Tokens/s of one and of two workers, by "1" and "2"."""
    config = RunConfig(base={"model": base_path(checkpoint)}, rollout={"num_workers": 3, "max_new_tokens": TOKENS})
    host = HostSpec(level="latent", checkpoint=str(checkpoint))
    settings = WorkerSettings(host=None, policy_dtype="float32", task=config.task, rollout=config.rollout)

    def side(pool: RolloutPool, workers: int) -> float:
        asked = [request(i, prompts, host=host) for i in range(workers * requests)]
        started = time.perf_counter()
        pool.submit(asked)
        tokens = sum(answer.summary.tokens for answer in pool.take(range(len(asked))))
        seconds = time.perf_counter() - started
        assert tokens == len(asked) * prompts * GROUP * TOKENS, "every response has full length"
        return tokens / seconds

    with connected(config):
        pools = {}
        for workers in (1, 2):
            rllib = workers_config(config, settings, ACTIONS).env_runners(num_env_runners=workers)
            group = EnvRunnerGroup(config=rllib, local_env_runner=False)
            pools[workers] = RolloutPool(group, timeout=120)
        return alternate({str(n): lambda pool=pool, n=n: side(pool, n) for n, pool in pools.items()}, repeats)


# -- the driver's cost --------------------------------------------------------------------------------------------------------


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
    requests = [request(i, PROMPTS, policy=algorithm.policy, ship_features=True) for i in range(ANSWERS)]
    made = ray.get([real.apply.remote(methodcaller("sample_request", asked)) for asked in requests])
    answers = ray.put(cloudpickle.dumps([(rollouts, summary, cloudpickle.dumps(metrics)) for rollouts, (summary, metrics) in made]))
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
            improve={"mode": "async", "max_staleness": 1, "prompts_per_update": PROMPTS * workers, "group_size": GROUP, "features": "ship"},
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
    wall, cpu, main = (after - b for after, b in zip((time.perf_counter(), time.process_time(), time.thread_time()), before, strict=False))
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


def driver_costs(options: Namespace) -> list[dict[str, Any]]:
    """``measure`` for each number of workers, each in a process of its own."""
    found = []
    for kind, counts in (("real", options.real), ("light", options.workers)):
        for workers in counts:
            command = [sys.executable, __file__, "--one", kind, str(workers), "--seconds", str(options.seconds)]
            command += ["--updates", str(options.updates), "--repeats", str(options.repeats)]
            run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(run.stdout.splitlines()[-1]))
            print(line(found[-1], None), flush=True)
    return found


def values(measured: dict[str, Any], name: str) -> list[float]:
    """One measure over the windows."""
    return [window[name] for window in measured["windows"]]


def line(measured: dict[str, Any], base: dict[str, Any] | None) -> dict[str, str]:
    """A row of the table; ``base`` is what the driver's cost is compared with."""
    median = {name: sorted(values(measured, name))[len(measured["windows"]) // 2] for name in measured["windows"][0]}
    return {
        "workers": f"{measured['workers']} {KINDS[measured['kind']]}",
        "rollouts/s": short(median["rollouts_per_second"]),
        "driver, ms CPU / rollout": spread(values(measured, "driver_ms")),
        "against 8": spread(list(ratio(values(measured, "driver_ms"), values(base, "driver_ms")).values())) if base else "",
        "main thread, ms": spread(values(measured, "main_thread_ms")),
        "saturated at, rollouts/s": short(1e3 / median["main_thread_ms"]),
        "GCS / raylet, ms": f"{short(median['gcs_ms'])} / {short(median['raylet_ms'])}",
        "KB / rollout": short(median["bytes"] / 1e3),
        "store, MB": short(median["store_mb"]),
        "driver, MB": short(median["driver_mb"]),
    }


# -- publishing ---------------------------------------------------------------------------------------------------------------


def publish_rates(megabytes: int, repeats: int) -> dict[str, list[float]]:
    """GB/s of each step from the learner's weights to a worker's, over 64 equal tensors."""
    gigabytes = megabytes / 1e3
    module = [torch.randn(megabytes * 1_000_000 // 256) for _ in range(64)]
    weights = {str(number): tensor.numpy() for number, tensor in enumerate(module)}
    steps = {
        "copy": lambda: {name: array.copy() for name, array in weights.items()},
        "hash": lambda: array_hash(weights),
        "put": lambda: ray.put(weights),
        "load": lambda: [tensor.copy_(torch.from_numpy(weights[str(number)].copy())) for number, tensor in enumerate(module)],
    }

    def rate(step: Callable[[], Any]) -> float:
        started = time.perf_counter()
        step()
        return gigabytes / (time.perf_counter() - started)

    with connected(RunConfig(base={"model": "none"}, rollout={"num_workers": 1})):
        torch.set_num_threads(1)
        return alternate({name: lambda step=step: rate(step) for name, step in steps.items()}, repeats)


def report_publishing(options: Namespace) -> None:
    """The table, and the two rates that ``scaling_plan.py`` reads."""
    rates = publish_rates(10 if options.quick else 500, options.repeats)
    slow = {name: 1 / statistics.median(measured) for name, measured in rates.items()}
    setting = {"publish_gb": 1 / (slow["copy"] + slow["hash"] + slow["put"]), "load_gb": 1 / (slow["hash"] + slow["load"])}
    rows = [{"step": name, "GB/s": spread(measured)} for name, measured in rates.items()]
    rows += [{"step": f"all of {name.removesuffix('_gb')}", "GB/s": short(value)} for name, value in setting.items()]
    report("scaling_publish", rows, {"gigabytes_per_second": rates, "setting": setting}, options.out)


def main() -> None:
    """Command line."""
    parser = arguments(__doc__)
    parts = ["real", "driver", "publish"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--workers", nargs="*", type=int, default=[1, 8, 64, 256], help="numbers of stand-ins")
    parser.add_argument("--real", nargs="*", type=int, default=[1, 8], help="numbers of LMEnvRunner actors on the simulated engine")
    parser.add_argument("--seconds", type=float, default=4.0, help="mean time of a request")
    parser.add_argument("--updates", type=int, default=3, help="updates per window")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "WORKERS"), help="only this one, as JSON (used by the script itself)")
    options = parser.parse_args()
    if options.one:
        kind, workers = options.one
        print(json.dumps(measure(kind, int(workers), options.seconds, options.updates, options.repeats)))
        return
    if options.quick:
        options.workers, options.real, options.seconds, options.updates, options.repeats = [1, 2], [1], 0.2, 1, 1
    if "real" in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            size = {"prompts": 2, "requests": 2} if options.quick else {"prompts": 16, "requests": 8}
            rates = real_workers(endless(Path(folder)), **size, repeats=options.repeats)
        two = spread(list(ratio(rates["2"], rates["1"]).values()))
        rows = [{"workers": n, "tokens/s": spread(rates[n]), "against 1": two if n == "2" else "1"} for n in rates]
        report("scaling_workers", rows, {"tokens_per_second": rates}, options.out)
    if "publish" in options.parts:
        report_publishing(options)
    if "driver" in options.parts:
        found = driver_costs(options)
        base = next((m for m in found if (m["kind"], m["workers"]) == ("light", 8)), None)
        report("scaling", [line(m, base) for m in found], {"seconds_per_request": options.seconds, "measured": found}, options.out)


if __name__ == "__main__":
    main()
