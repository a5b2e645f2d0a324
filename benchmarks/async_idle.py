"""Asynchronous training: how long each side waits for the other, and updates/s against synchronous training.

    python benchmarks/async_idle.py [--repeats 5] [--quick] [--out DIR]

One rollout worker and one learner actor, a thread each, on the 0.9 M-parameter base LM; 16 prompts in groups of 8,
responses of 48 tokens. The learner passes so often over each batch (``epochs``) that both sides have about the same to
do, which is where waiting shows most. The same actors run all modes in turn; after each change of mode two updates are
not timed. Idle shares are the run's own metrics: the learner's is the time in which it was not updating (publishing
counts as idle), the worker's that in which it had no request in its hands. The bar is an idle share of the busier side
of at most 10 %.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import alternate, arguments, ratio, report, spread
from models import endless

from configs.schema import RunConfig
from latent_control.pretrained import base_path
from pipeline.cluster.connect import connected
from pipeline.rl.algorithm import LatentRL
from pipeline.rl.config import algorithm_config
from pipeline.stages.improve import update_metrics
from rollout_workers.rollouts import HostSpec

MODES: dict[str, dict[str, Any]] = {
    "sync": {"mode": "sync"},
    "async, staleness 1": {"mode": "async", "max_staleness": 1},
    "async, staleness 2": {"mode": "async", "max_staleness": 2},
    "async, staleness 2, drop": {"mode": "async", "max_staleness": 2, "stale": "drop"},
    "async, staleness 2, in flight": {"mode": "async", "max_staleness": 2, "refresh_in_flight": True},
}


def config_of(checkpoint: Path, new_tokens: int, **improve: Any) -> RunConfig:
    """One mode's config."""
    return RunConfig(
        base={"model": base_path(checkpoint)},
        improve={"prompts_per_update": 16, "group_size": 8, "learning_rate": 1e-5, **improve},
        rollout={"num_workers": 1, "max_new_tokens": new_tokens},
        cluster={"num_learners": 1, "learner_threads": 1},
    )


@contextmanager
def training(checkpoint: Path, new_tokens: int) -> Iterator[LatentRL]:
    """One worker, one learner actor."""
    config = config_of(checkpoint, new_tokens)
    with connected(config):
        torch.set_num_threads(1)
        host = HostSpec(level="latent", checkpoint=str(checkpoint))
        algorithm: LatentRL = algorithm_config(
            config, host, num_actions=64, reads="late", late_blocks=2, learning_rate=1e-5
        ).build_algo()
        try:
            yield algorithm
        finally:
            algorithm.stop()


def run(algorithm: LatentRL, config: RunConfig, updates: int) -> list[dict[str, float]]:
    """Metrics of this many updates in this mode, after two that do not count."""
    state = algorithm.learner_state()
    algorithm.use(config)
    algorithm.restore_learner(state)  # forgets what another mode has asked for
    return [update_metrics(algorithm.train()) for _ in range(updates + 2)][2:]


def share(metrics: list[dict[str, float]], name: str) -> float:
    """Mean of a metric, weighted by the updates' times."""
    total = sum(m["seconds_update_total"] for m in metrics)
    return sum(m[name] * m["seconds_update_total"] for m in metrics) / total


def main() -> None:
    """Measure, print, write."""
    options = arguments(__doc__).parse_args()
    updates, new_tokens = (4, 8) if options.quick else (20, 48)
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in MODES}
    with tempfile.TemporaryDirectory() as work:
        checkpoint = endless(Path(work))
        with training(checkpoint, new_tokens) as algorithm:
            probe = run(algorithm, config_of(checkpoint, new_tokens), 4)
            passes = max(
                1, round(sum(m["seconds_sampling"] for m in probe) / sum(m["seconds_updating"] for m in probe))
            )

            def side(name: str) -> float:
                metrics = run(algorithm, config_of(checkpoint, new_tokens, epochs=passes, **MODES[name]), updates)
                seen[name] += metrics
                return len(metrics) / sum(m["seconds_update_total"] for m in metrics)

            rates = alternate({name: lambda name=name: side(name) for name in MODES}, options.repeats)
    rows = [row(name, seen[name][updates:], rates) for name in MODES]
    report("async_idle", rows, {"epochs": passes, "updates_per_round": updates, "rates": rates}, options.out)


def row(name: str, metrics: list[dict[str, float]], rates: dict[str, list[float]]) -> dict[str, Any]:
    """One mode's line; the first round was to warm up."""
    learner, worker = share(metrics, "idle_learner"), share(metrics, "idle_workers")
    return {
        "mode": name,
        "updates/s": spread(rates[name]),
        "against sync": spread(list(ratio(rates[name], rates["sync"]).values())),
        "idle learner": learner,
        "idle worker": worker,
        "idle, busier side": min(learner, worker),
        "staleness, mean / "
        "max": f"{share(metrics, 'staleness_mean'):.2f} / {max(m['staleness_max'] for m in metrics):.0f}",
    }


if __name__ == "__main__":
    main()
