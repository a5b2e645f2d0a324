"""An RL step: samples/s of this project's pipeline against TRL's GRPOTrainer.

    python -m venv trl && trl/bin/pip install -c requirements.lock torch
    trl/bin/pip install 'trl==1.16.0' 'transformers==5.23.0'
    python benchmarks/trl_grpo.py --peer-python trl/bin/python [--repeats 5] [--quick] [--out DIR]

Both sides: the 0.9 M-parameter base LM, countdown's prompts and verifier, GRPO, groups of 8, 16 prompts an update, one
optimiser step per batch, fp32, AdamW, temperature 1, 2 cores. Ours: two workers with one thread and the learner in the
driver (2 threads), the replay buffer written; only the policy is trained. TRL: one process with 2 threads; it trains
all parameters, by the last base's token probabilities, and generates with transformers. ``fixed``: every response has
exactly that many tokens on both sides (no end token), 64 random codes. ``natural``: responses end by themselves, ours
from the cloned checkpoint given (of countdown.yaml). Rounds of updates alternate, start-up and the first round (3
updates or more) are not timed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
import torch
from common import Peer, alternate, arguments, ratio, report, short, spread
from models import endless

from configs.schema import RunConfig
from latent_control.pretrained import base_path
from pipeline.cluster.connect import connected
from pipeline.replay.actor import ReplayActor, ReplayHandle
from pipeline.rl.accounting import Records
from pipeline.rl.algorithm import LatentRL
from pipeline.rl.config import algorithm_config
from pipeline.stages.improve import update_metrics
from rollout_workers.rollouts import HostSpec

PROMPTS, GROUP, LEARNING_RATE = 16, 8, 5e-4
PARTS = (
    "seconds_sampling",
    "seconds_waiting",
    "seconds_updating",
    "seconds_publishing",
    "tokens_per_rollout",
    "reward",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the table."""

    name: str
    checkpoint: Path
    new_tokens: int
    fixed: bool
    mode: str


@contextmanager
def our_side(case: Case, work: Path, metrics: list[dict[str, float]]) -> Iterator[Callable[[int], float]]:
    """A function that trains this many updates and returns their seconds; ``metrics`` grows by each update's."""
    config = RunConfig(
        base={"model": base_path(case.checkpoint)},
        improve={"prompts_per_update": PROMPTS, "group_size": GROUP, "learning_rate": LEARNING_RATE, "mode": case.mode},
        rollout={"num_workers": 2, "max_new_tokens": case.new_tokens},
    )
    assert config.improve is not None
    host = HostSpec(level="latent", checkpoint=str(case.checkpoint))
    with connected(config):
        torch.set_num_threads(config.cluster.learner_threads)
        algorithm: LatentRL = algorithm_config(
            config, host, num_actions=64, reads="late", late_blocks=2, learning_rate=LEARNING_RATE
        ).build_algo()
        replay = ray.remote(num_cpus=0)(ReplayActor).remote(str(work / case.name), 4096, "a")
        algorithm.attach(Records(replay=ReplayHandle(replay)))

        def train(updates: int) -> float:
            started = time.perf_counter()
            metrics.extend(update_metrics(algorithm.train()) for _ in range(updates))
            return time.perf_counter() - started

        try:
            yield train
        finally:
            algorithm.stop()


def measure(
    case: Case, peer_python: str, work: Path, updates: int, repeats: int
) -> tuple[dict[str, str], dict[str, object]]:
    """Line of the table and raw numbers."""
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    settings = {
        "base": base_path(case.checkpoint),
        "max_new_tokens": case.new_tokens,
        "fixed_length": case.fixed,
        "prompts": PROMPTS,
        "group": GROUP,
        "learning_rate": LEARNING_RATE,
        "threads": 2,
    }
    samples = updates * PROMPTS * GROUP
    with Peer(peer_python, "trl_grpo.py", settings, threads=2) as peer, our_side(case, work, ours) as train:

        def trl() -> float:
            theirs.append(peer.ask(updates))
            return samples / theirs[-1]["seconds"]

        rates = alternate({"ours": lambda: samples / train(updates), "trl": trl}, repeats)
    settled = ours[updates:]
    parts = {name: sum(m[name] for m in settled) / len(settled) for name in PARTS if name in settled[0]}
    line = {
        "case": case.name,
        "ours, samples/s": spread(rates["ours"]),
        "TRL, samples/s": spread(rates["trl"]),
        "ours / TRL": spread(list(ratio(rates["ours"], rates["trl"]).values())),
        "tokens per response, ours / "
        "TRL": f"{parts['tokens_per_rollout']:.1f} / {sum(t['tokens'] for t in theirs) / len(theirs):.1f}",
    }
    return line, {
        "samples_per_second": rates,
        "ours_mean_per_update": parts,
        "trl_rounds": theirs,
        "ratio": ratio(rates["ours"], rates["trl"]),
    }


def main() -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--peer-python", required=True, help="interpreter of the environment with TRL")
    parser.add_argument("--updates", type=int, default=10, help="updates per round")
    parser.add_argument(
        "--checkpoint", type=Path, help="a cloned checkpoint on countdown-1m: adds the line with natural lengths"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[48, 16], help="new tokens of the fixed lines")
    options = parser.parse_args()
    if options.quick:
        options.updates, options.lengths = 3, [4]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        checkpoint = endless(work)
        cases = [
            Case(name=f"fixed {n}, {mode}", checkpoint=checkpoint, new_tokens=n, fixed=True, mode=mode)
            for n in options.lengths
            for mode in ("sync", "async")
        ]
        if options.checkpoint:
            cases.append(
                Case(
                    name="natural, at most 48, sync",
                    checkpoint=options.checkpoint.absolute(),
                    new_tokens=48,
                    fixed=False,
                    mode="sync",
                )
            )
        lines, raw = [], {}
        for case in cases:
            line, raw[case.name] = measure(case, options.peer_python, work, options.updates, options.repeats)
            lines.append(line)
            print(line, {name: short(v) for name, v in raw[case.name]["ours_mean_per_update"].items()}, flush=True)  # type: ignore[attr-defined]
    report("trl_grpo", lines, {"measured": raw}, options.out)


if __name__ == "__main__":
    main()
