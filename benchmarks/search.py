"""Search at equal budget on countdown: does a tree over chunks of codes beat as many tokens of best-of-n?

    python benchmarks/search.py --runs RUN_DIR ... --q Q_DIR ...     finished countdown runs, and a train-q checkpoint
    for each

For each run's improved and cloned policy: MCTS and MCTS-Q, valued by the verifier (then best-of-n is pass@n, and both
rows see the truth) and by the Q head (then nothing does), at several numbers of iterations. Best-of-n gets at least as
many generated tokens for each prompt. Differences are paired over prompts and pooled over the runs; their intervals are
bootstrapped. One process, no Ray.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, report

from pipeline.evaluation.statistics import paired_difference
from pipeline.experiments.search import SearchOptions, play, prepare

POLICIES = ("improve", "clone")


def cases(iterations: list[int], temperatures: list[float]) -> list[dict[str, Any]]:
    """What is compared: value, method, iterations, temperature."""
    return [
        {"value": value, "method": method, "iterations": count, "temperature": temperature}
        for value in ("verifier", "q")
        for method in ("mcts", "mcts-q")
        for count in iterations
        for temperature in temperatures
    ]


def measured(run: Path, q: Path, case: dict[str, Any], policy: str, chunk: int, prompts: int) -> dict[str, Any]:
    """One table, without its words."""
    asked = SearchOptions(**case, chunk=chunk, prompts=prompts)
    result = play(prepare(run / "checkpoints" / policy, asked, q), asked)
    return case | {
        "policy": policy,
        "chunk": chunk,
        "run": run.name,
        "rows": result["rows"],
        "successes": digits(result["successes"]),
    }


def digits(successes: dict[str, list[int]]) -> dict[str, str]:
    """A 0 or 1 for each prompt: ``{"greedy": "0110"}``, short enough to keep."""
    return {name: "".join(map(str, values)) for name, values in successes.items()}


def row_of(some: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs of one case as a row."""
    first = some[0]
    pooled = {
        name: np.array([int(d) for one in some for d in one["successes"][name]], float) for name in first["successes"]
    }
    difference = paired_difference(pooled[first["method"]], pooled["best-of-n"], seed=0)

    def mean(name: str, key: str) -> float:
        return float(np.mean([row[key] for one in some for row in one["rows"] if row["name"] == name]))

    return {
        "policy": first["policy"],
        "value": first["value"],
        "method": first["method"],
        "iterations": first["iterations"],
        "temperature": first["temperature"],
        "n": len(pooled["greedy"]),
        "greedy": f"{pooled['greedy'].mean():.3f}",
        "sampled": f"{pooled['sampled'].mean():.3f}",
        "best-of-n": f"{pooled['best-of-n'].mean():.3f}",
        "search": f"{pooled[first['method']].mean():.3f}",
        "search - best-of-n": f"{difference['mean']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f})",
        "tokens": f"{mean(first['method'], 'tokens_per_prompt'):.0f} / {mean('best-of-n', 'tokens_per_prompt'):.0f}",
        "seconds": f"{mean(first['method'], 'seconds_per_prompt'):.3f} / {mean('best-of-n', 'seconds_per_prompt'):.3f}",
    }


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, repeats=1)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="finished run folders")
    parser.add_argument("--q", type=Path, nargs="+", required=True, help="a Q head for each of them")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--iterations", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0])
    parser.add_argument("--chunk", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=128, help="held-out prompts per run")
    chosen = parser.parse_args()
    if len(chosen.q) != len(chosen.runs):
        parser.error(f"{len(chosen.runs)} --runs, but {len(chosen.q)} --q: give one for each")
    torch.set_num_threads(1)
    prompts, iterations = (4, [2]) if chosen.quick else (chosen.prompts, chosen.iterations)
    started, rows, found = time.perf_counter(), [], []
    for policy in chosen.policies:
        for case in cases(iterations, chosen.temperatures):
            some = [
                measured(run.absolute(), q.absolute(), case, policy, chosen.chunk, prompts)
                for run, q in zip(chosen.runs, chosen.q, strict=True)
            ]
            found += some
            rows.append(row_of(some))
            print(f"{time.perf_counter() - started:.0f} s: {rows[-1]}", flush=True)
    report("search", rows, {"repeats": found, "seconds": time.perf_counter() - started}, chosen.out)


if __name__ == "__main__":
    main()
