"""Works out what limits a cluster: rollouts/s of its workers, learners, network and driver, for the paper's 8 B setting
or any other.

    python benchmarks/scaling_plan.py [--gpus 8 16 ...] [--set FIELD=VALUE ...] [--results DIR]

Every field of ``Setting`` can be set; ``docs/scaling.md`` explains the formulas. What the driver costs and how fast
weights are published and loaded comes from ``scaling.json`` and ``publish.json`` in ``--results``; everything about
GPUs and networks is assumed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from common import RESULTS, short, table

from pipeline.rl.prompt_order import equal_chunk_count


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Llama-3.1-8B with the paper's policy on H100s. Weights in billions; GB and TFLOP in powers of ten."""

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
    prompts: int = 256
    """Per update."""
    staleness: int = 1
    """``improve.max_staleness``."""
    rows: int = 128
    """``rollout.batch_size``: decoded at once on a GPU."""
    recompute: int = 0
    """1: the learner runs the base LM itself; 0: features travel."""
    stateless: int = 0
    """1: an ``mlp`` policy, which learns from the states of choices alone: prompts do not travel."""
    refresh: int = 0
    """1: ``improve.refresh_in_flight``."""
    memory_tb: float = 3.35
    """TB/s of a GPU."""
    memory_share: float = 0.4
    """Of it that decoding reaches."""
    matmul_tflops: float = 989.0
    """bf16, dense."""
    matmul_share: float = 0.4
    """Of it that an update reaches."""
    gpus_per_node: int = 8
    network_gb: float = 2.0
    """GB/s into a node's object store."""
    link_gb: float = 40.0
    """GB/s between learners for gradients."""
    driver_ms: float = 0.2
    """Main thread per rollout."""
    publish_gb: float = 1.0
    """GB/s at which the driver copies, hashes and stores weights."""
    load_gb: float = 1.4
    """GB/s at which a worker hashes and loads them."""


def decode_rate(s: Setting, rows: float) -> float:
    """Tokens/s of a GPU: each step reads all weights once and every row's caches, at half the response on average."""
    weights = 2e9 * (s.base_billions + s.policy_billions + s.merge_billions)
    caches = rows * (s.prompt_tokens + s.response_tokens / 2) * 2 * s.layers * s.cache_width
    return rows * s.memory_tb * 1e12 * s.memory_share / (weights + caches)


def learn_rate(s: Setting) -> float:
    """Rollouts/s of a learner's GPU: 6 FLOP per policy weight and position, 2 per base weight where features are
    recomputed."""
    flop = 1e9 * (6 * s.policy_billions + 2 * s.base_billions * s.recompute)
    positions = s.response_tokens if s.stateless else s.prompt_tokens + s.response_tokens
    return s.matmul_tflops * 1e12 * s.matmul_share / (flop * positions)


def standstill(s: Setting, workers: int, rows: float) -> float:
    """Seconds in which a worker does not decode because of a new policy version: it arrives, is hashed and loaded.

    In flight it arrives meanwhile, but the policy's caches of all rows are computed again.
    """
    gigabytes, nodes = 4 * s.policy_billions, math.ceil(workers / s.gpus_per_node)
    broadcast = gigabytes / s.network_gb * math.ceil(math.log2(nodes + 1))
    positions = rows * (s.prompt_tokens + s.response_tokens / 2)
    again = 0 if s.stateless else 2e9 * s.policy_billions * positions / (s.matmul_tflops * 1e12 * s.matmul_share)
    return gigabytes / s.load_gb + (again if s.refresh else broadcast)


def plan(s: Setting, workers: int, learners: int) -> dict[str, Any]:
    """Rates in rollouts/s, times in seconds; ``limit`` names the smallest of the rates."""
    update = s.prompts * s.group
    requests = equal_chunk_count(s.prompts, workers, learners)
    rows = min(s.rows, update / requests)  # a worker decodes one request at a time
    busy = min(workers, (s.staleness + 1) * requests)  # more requests are never open
    decode = update * s.response_tokens / (busy * decode_rate(s, rows))
    learn, gigabytes = update / (learners * learn_rate(s)), 4 * s.policy_billions
    reduce, publish = 2 * gigabytes / s.link_gb * (learners - 1) / learners, gigabytes / s.publish_gb
    positions = s.response_tokens if s.stateless else s.prompt_tokens + s.response_tokens - 1
    features = 0 if s.recompute else 2e-9 * s.width * positions
    seconds = {
        "workers": decode + standstill(s, workers, rows),
        "learners": learn + reduce + publish,  # it waits while its weights are published
        "network": update * features / (s.network_gb * math.ceil(learners / s.gpus_per_node)),
        "driver": update * s.driver_ms / 1e3 + publish,
    }
    limit = max(seconds, key=lambda name: seconds[name])
    return {
        "workers": workers,
        "learners": learners,
        "rows": rows,
        "busy": busy,
        "seconds": seconds,
        "limit": limit,
        "rollouts_per_second": update / seconds[limit],
    }


def best(s: Setting, gpus: int) -> dict[str, Any]:
    """The fastest split of this many GPUs; learners must divide the prompts."""
    splits = [plan(s, gpus - learners, learners) for learners in range(1, gpus) if s.prompts % learners == 0]
    return max(splits, key=lambda split: split["rollouts_per_second"])


def measured(results: Path) -> dict[str, float]:
    """The fields of ``Setting`` that the results in this folder give: the driver's cost with the largest number of
    workers."""
    found: dict[str, float] = {}
    if (results / "scaling.json").is_file():
        runs = json.loads((results / "scaling.json").read_text())["measured"]
        largest = max(runs, key=lambda run: run["workers"])
        found["driver_ms"] = statistics.median(window["main_thread_ms"] for window in largest["windows"])
    if (results / "publish.json").is_file():
        found |= json.loads((results / "publish.json").read_text())["setting"]
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
        "GPUs": str(row["workers"] + row["learners"]),
        "workers + learners": f"{row['workers']} + {row['learners']}",
        "rows": short(row["rows"]),
        "busy": str(row["busy"]),
        **{f"{name}, s": short(seconds) for name, seconds in row["seconds"].items()},
        "limit": row["limit"],
        "rollouts/s": short(row["rollouts_per_second"]),
        "per GPU": short(row["rollouts_per_second"] / (row["workers"] + row["learners"])),
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
    print(
        f"per GPU: {decode_rate(setting, setting.rows):,.0f} tokens/s decoded, {learn_rate(setting):.3g} rollouts/s "
        "learned"
    )
    print(f"measured: {', '.join(f'{name} = {short(value)}' for name, value in found.items()) or 'nothing'}\n")
    print(table([cells(best(setting, gpus)) for gpus in options.gpus]))


if __name__ == "__main__":
    main()
