"""SmolLM2's config in bfloat16, as it was written, and with the number types that ``auto`` picks on this machine.

    python benchmarks/number_type.py [--rows 16] [--updates 5] [--repeats 1] [--quick] [--out DIR]

Each stage's own work in this process, by turns: updates of the offline stages (``--rows`` sequences of the config's own
data, two threads), rollouts of one worker (one thread), the update of the policy on as many rollouts. ``--quick`` does
it with the embedded LM. ``ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2`` makes any x86 machine one without
bfloat16. Processor seconds count (of all threads), wall seconds stand beside them: others may be at work.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from common import ROOT, alternate, arguments, ratio, report, spread

from configs.loading import load_config
from configs.schema import RunConfig
from pipeline.preflight.number_type import decided
from pipeline.runs.stage_table import planned
from pipeline.stages.speed import Rehearsal

STAGES = ("actions", "clone", "finetune", "improve")
BEFORE = ["base.dtype=bfloat16", *(f"{stage}.mixed_precision=bf16" for stage in STAGES)]
LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")


def timed(work: Callable[[], Any], updates: int, wall: list[float]) -> Callable[[], float]:
    """Processor seconds of one call, the mean of ``updates``; wall seconds go to ``wall``."""

    def side() -> float:
        started, processor = time.perf_counter(), time.process_time()
        for _ in range(updates):
            work()
        wall.append((time.perf_counter() - started) / updates)
        return (time.process_time() - processor) / updates

    return side


def works(config: RunConfig, rows: int) -> dict[str, Callable[[], Callable[[], Any]]]:
    """What prepares each kind of work of a side, by its name; to be called in this order."""
    rehearsal = Rehearsal(config)
    found: dict[str, Callable[[], Callable[[], Any]]] = {}

    def update_of(stage: Any) -> Callable[[], Any]:
        update = rehearsal.offline(stage)[0]
        return lambda: update(rows)

    def rollouts() -> Callable[[], Any]:
        decode = rehearsal.decoding()
        return lambda: decode(max(1, rows // rehearsal.group), config.rollout.max_new_tokens)

    def learning() -> Callable[[], Any]:
        learn = rehearsal.learning()
        return lambda: learn(rows)

    for stage in planned(config):
        if not stage.online:
            found[f"{stage.name}: update of {rows} sequences"] = lambda stage=stage: update_of(stage)
    found[f"improve: update on {rows} rollouts"] = learning
    found[f"improve: {max(1, rows // rehearsal.group)} x {rehearsal.group} rollouts"] = rollouts
    return found


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, repeats=1)
    parser.add_argument("--rows", type=int, default=16, help="sequences, and rollouts, of an update")
    parser.add_argument("--updates", type=int, default=5, help="updates of a round")
    options = parser.parse_args()
    tiny = [f"base.model={ROOT / 'configs/models/countdown-1m'}", "task={name: countdown}"]
    tiny += [f"{stage}.data=[{{kind: task}}]" for stage in STAGES[:3]]
    tiny += ["actions.inverse_dynamics_layers=2", "actions.policy_layers=2"]
    small = tiny if options.quick else []
    path = ROOT / "configs" / "smollm2.yaml"
    auto, reasons = decided(load_config(path, small))
    kinds = {"bfloat16": works(load_config(path, [*BEFORE, *small]), options.rows), "auto": works(auto, options.rows)}
    lines, raw = [], {}
    for name in kinds["auto"]:
        wall: dict[str, list[float]] = {side: [] for side in kinds}
        ready = {side: kinds[side][name]() for side in kinds}
        seconds = alternate({side: timed(ready[side], options.updates, wall[side]) for side in kinds}, options.repeats)
        shares = ratio(seconds["auto"], seconds["bfloat16"])
        raw[name] = {"processor_seconds": seconds, "wall_seconds": {side: w[1:] for side, w in wall.items()}}
        lines.append(
            {
                "work": name,
                "bfloat16, processor seconds": spread(seconds["bfloat16"]),
                "auto": spread(seconds["auto"]),
                "auto / bfloat16": spread(list(shares.values())),
            }
        )
        print(lines[-1], flush=True)
    limits = {name: os.environ[name] for name in LIMITS if name in os.environ}
    report("number_type", lines, {"measured": raw, "reasons": reasons, "limits": limits}, options.out)


if __name__ == "__main__":
    main()
