"""How long a bank's training will take, from a few seconds of its work done here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from configs.schema import RunConfig
from pipeline.console.progress import clock
from pipeline.preflight.number_type import decided
from pipeline.runs.environment import calm_libraries
from pipeline.runs.forecast import START, from_speeds
from pipeline.runs.stage_table import IMPROVE
from pipeline.stages.speed import measured_speeds

EACH = 2.0
"""Seconds of a run beside its updates: its folder, learner, records, and place in the bank."""


def lines(configs: Sequence[RunConfig]) -> Iterator[str]:
    """The forecast in words. Rollouts and updates of the first task are measured; the others count by theirs."""
    if configs[0].cluster.address != "local":
        yield "how long it takes was not measured: the work is not this machine's (cluster.address)"
        return
    calm_libraries()
    try:
        speeds = measured_speeds(decided(configs[0])[0])
    except (ValueError, OSError, RuntimeError) as error:
        yield f"how long it takes is not known: {error}"
        return
    around = START + speeds.load
    work = sum(from_speeds(config, speeds)[IMPROVE] - around for config in configs)
    together = around + EACH * len(configs) + work
    yield (
        f"{len(configs)} policies: at most about {clock(together)}, as if no two shared a batch (one after another "
        f"{clock(work + (around + EACH) * len(configs))})"
    )
