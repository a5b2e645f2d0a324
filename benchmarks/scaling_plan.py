"""Works out what limits a cluster: rollouts/s of workers, learners and driver, for the paper's 8 B setting or any other.

    python benchmarks/scaling_plan.py [--gpus 8 16 ...] [--set FIELD=VALUE ...] [--results DIR]

Every field of ``Setting`` can be set; ``docs/scaling.md`` explains the formulas. The driver's cost and the speed of publishing come
from ``scaling.json`` and ``scaling_publish.json`` in ``--results`` where they are there; everything about GPUs and networks is assumed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from common import RESULTS, short, table


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Llama-3.1-8B with the paper's policy, on H100s. Weights in billions; bytes and rates in SI units."""

    base_billions: float = 8.03
    policy_billions: float = 1.75
    merge_billions: float = 0.59
    width: int = 4096
    layers: int = 40
    """With a key-value cache: 32 of the base, 8 of the policy."""
    cache_width: int = 2048
    """Keys and values per layer and token: 2 x 8 heads x 128."""
    prompt_tokens: int = 256
    response_tokens: int = 768
    group: int = 16
    rollouts_per_update: int = 4096
    rollouts_per_request: int = 16
    rows: int = 128
    """Decoded at once on a GPU."""
    recompute: int = 0
    """1: the learner runs the base LM itself; 0: features travel."""
    memory_tb: float = 3.35
    """TB/s of a GPU (H100 SXM, data sheet)."""
    memory_share: float = 0.4
    """Of it that decoding reaches (assumed)."""
    matmul_tflops: float = 989.0
    """bf16, dense (H100 SXM, data sheet)."""
    matmul_share: float = 0.4
    """Of it that an update reaches (assumed)."""
    gpus_per_node: int = 8
    network_gb: float = 2.0
    """GB/s from one node's object store to another's (assumed)."""
    link_gb: float = 40.0
    """GB/s between learners for gradients (assumed)."""
    driver_ms_per_request: float = 3.0
    """Main thread."""
    publish_gb: float = 0.5
    """GB/s at which the driver gathers, hashes and stores weights."""
    load_gb: float = 0.5
    """GB/s at which a worker hashes and loads them."""


def decode_rate(s: Setting) -> float:
    """Tokens/s of a GPU: each step reads all weights once and every row's caches, at half the response on average."""
    weights = 2e9 * (s.base_billions + s.policy_billions + s.merge_billions)
    caches = s.rows * (s.prompt_tokens + s.response_tokens / 2) * 2 * s.layers * s.cache_width
    return s.rows * s.memory_tb * 1e12 * s.memory_share / (weights + caches)


def learn_rate(s: Setting) -> float:
    """Rollouts/s of a learner's GPU: 6 FLOP per policy weight and position, 2 per base weight where features are recomputed."""
    flop = 1e9 * (6 * s.policy_billions + 2 * s.base_billions * s.recompute)
    return s.matmul_tflops * 1e12 * s.matmul_share / (flop * (s.prompt_tokens + s.response_tokens))


def plan(s: Setting, gpus: int) -> dict[str, Any]:
    """Rates in rollouts/s, times in seconds; ``limit`` names the smallest of the rates."""
    per_worker, per_learner = decode_rate(s) / s.response_tokens, learn_rate(s)
    learners = max(1, round(gpus * per_worker / (per_worker + per_learner)))
    workers, update = gpus - learners, s.rollouts_per_update
    nodes, weights_gb = math.ceil(workers / s.gpus_per_node), 4 * s.policy_billions
    publish, load = weights_gb / s.publish_gb, weights_gb / s.load_gb
    requests = update / s.rollouts_per_request
    reduce_ = 2 * weights_gb / s.link_gb * (learners - 1) / learners
    rates = {
        # A worker stands still while it loads a version.
        "workers": update / (update / (workers * per_worker) + load),
        "learners": update / (update / (learners * per_learner) + reduce_),
        "driver": update / (requests * s.driver_ms_per_request / 1e3 + publish),
    }
    limit = min(rates, key=lambda name: rates[name])
    features = 0 if s.recompute else 2 * s.width * (s.prompt_tokens + s.response_tokens - 1)
    return {
        "gpus": gpus,
        "split": f"{workers} + {learners}",
        **rates,
        "limit": limit,
        "seconds_per_update": update / rates[limit],
        # What is being decoded when an update ends was begun under older versions.
        "staleness": math.ceil(workers * s.rows / update),
        "features_gb": rates[limit] * features / 1e9,
        "broadcast": weights_gb / s.network_gb * math.ceil(math.log2(nodes + 1)),
        "busy": rates[limit] / (workers * per_worker),
    }


def measured(results: Path) -> dict[str, float]:
    """The fields of ``Setting`` that the results in this folder give."""
    found: dict[str, float] = {}
    if (results / "scaling.json").is_file():
        runs = json.loads((results / "scaling.json").read_text())["measured"]
        largest = max(runs, key=lambda run: run["workers"])
        times = sorted(window["main_thread_ms"] for window in largest["windows"])
        found["driver_ms_per_request"] = times[len(times) // 2] * largest["rollouts_per_request"]
    if (results / "scaling_publish.json").is_file():
        found |= json.loads((results / "scaling_publish.json").read_text())["setting"]
    return found


def with_values(setting: Setting, values: Mapping[str, float | str]) -> Setting:
    """``setting`` with other values; ``ValueError`` for a field it lacks."""
    kinds = {field.name: type(getattr(setting, field.name)) for field in fields(setting)}
    if unknown := values.keys() - kinds.keys():
        raise ValueError(f"{', '.join(sorted(unknown))}: no such field; there are {', '.join(kinds)}")
    return replace(setting, **{name: kinds[name](value) for name, value in values.items()})


def cells(row: Mapping[str, Any]) -> dict[str, str]:
    """A line of the printed table."""
    return {
        "GPUs": str(row["gpus"]),
        "workers + learners": row["split"],
        "workers, rollouts/s": short(row["workers"]),
        "learners": short(row["learners"]),
        "driver": short(row["driver"]),
        "limit": row["limit"],
        "workers' share of decoding": f"{row['busy']:.0%}",
        "s / update": short(row["seconds_per_update"]),
        "updates in flight": str(row["staleness"]),
        "features, GB/s": short(row["features_gb"]),
        "broadcast, s": short(row["broadcast"]),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="e.g. rows=64 recompute=1")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the measured JSON files")
    options = parser.parse_args()
    found = measured(options.results)
    setting = with_values(with_values(Setting(), found), dict(word.split("=", 1) for word in options.set))
    rates = f"{decode_rate(setting):,.0f} tokens/s decoded, {learn_rate(setting):.3g} rollouts/s learned"
    print(f"per GPU: {rates}; measured: {', '.join(f'{name} = {short(value)}' for name, value in found.items()) or 'nothing'}\n")
    print(table([cells(plan(setting, gpus)) for gpus in options.gpus]))


if __name__ == "__main__":
    main()
