"""GB/s of what a new policy version costs on both sides of the network, one thread.

    python benchmarks/publish.py [--repeats 5] [--quick] [--out DIR]

The driver copies, hashes and stores the learner's float32 weights (``publish``); each worker hashes them and copies
them into its module (``load``). 64 equal tensors, 0.5 GB together. The way over the network is not measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import ray
import torch
from common import alternate, arguments, report, short, spread

from configs.schema import RunConfig
from latent_control.pretrained import array_hash
from pipeline.cluster.connect import connected

TENSORS = 64


def rates(gigabytes: float, repeats: int) -> dict[str, list[float]]:
    """GB/s of each step."""
    module = [torch.randn(int(gigabytes * 1e9 / 4 / TENSORS)) for _ in range(TENSORS)]
    weights = {str(number): tensor.numpy() for number, tensor in enumerate(module)}
    steps: dict[str, Callable[[], Any]] = {
        "copy": lambda: {name: array.copy() for name, array in weights.items()},
        "hash": lambda: array_hash(weights),
        "put": lambda: ray.put(weights),
        "load": lambda: [
            tensor.copy_(torch.from_numpy(weights[str(number)].copy())) for number, tensor in enumerate(module)
        ],
    }

    def rate(step: Callable[[], Any]) -> float:
        started = time.perf_counter()
        step()
        return gigabytes / (time.perf_counter() - started)

    with connected(RunConfig(base={"model": "none"}, rollout={"num_workers": 1})):
        torch.set_num_threads(1)
        return alternate({name: lambda step=step: rate(step) for name, step in steps.items()}, repeats)


def in_turn(measured: dict[str, list[float]], *steps: str) -> float:
    """GB/s of several steps one after the other."""
    return 1 / sum(1 / median(measured[step]) for step in steps)


def main() -> None:
    """Command line."""
    options = arguments(__doc__).parse_args()
    measured = rates(0.01 if options.quick else 0.5, options.repeats)
    setting = {"publish_gb": in_turn(measured, "copy", "hash", "put"), "load_gb": in_turn(measured, "hash", "load")}
    rows = [{"step": name, "GB/s": spread(values)} for name, values in measured.items()]
    rows += [{"step": f"all of {name.removesuffix('_gb')}", "GB/s": short(value)} for name, value in setting.items()]
    report("publish", rows, {"gigabytes_per_second": measured, "setting": setting}, options.out)


if __name__ == "__main__":
    main()
