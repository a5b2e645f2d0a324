"""One codebook on three tasks: codes found on countdown, used as they are on two tasks they have never seen, against
new ones for each.

    python benchmarks/studies/transfer.py --out runs/study

A base LM is trained on three tasks at once (countdown, sorting four numbers, their running sums), a third of whose
demonstrations are right. ``retrained``: codes (600 updates) and policy (500) are made for the new task. ``countdown's
codes``: those and their merge module as they are; only the policy is cloned, 110 updates, a tenth of the former.
``broad codes``: the same with codes found once on text of all three tasks. All read text like the base LM's own, a
third of it right: with right answers alone, retraining would be supervised fine-tuning of the world model. Then all get
the same reinforcement learning.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import ROOT, Curve, cloned, curve, improved, row, run, side_by_side, write

from configs.loading import load_config
from learners.base_training import train_base
from rollout_workers.tasks.countdown import Countdown
from rollout_workers.tasks.protocol import Demonstration, LazySequence, Prompt, Split

UPDATES, LAST, SEEDS = 150, 20, (0, 1, 2)
ROWS, SKILL, REUSED_UPDATES = 20_000, 0.35, 110
NEW = ("sort", "sums")
WAYS = {"retrained": "retrained", "reused": "countdown's codes", "broad": "broad codes"}
"""Ways of getting codes and policy, by the names of their folders."""


def problem(kind: str, index: int) -> tuple[str, str, str]:
    """(prompt, right response, a response of the right form that is wrong)."""
    rng = random.Random(f"{kind}/{index}")
    numbers = rng.sample(range(1, 30), 4)
    if kind == "sort":
        right, wrong = sorted(numbers), rng.sample(numbers, 4)
        while wrong == right:
            wrong = rng.sample(numbers, 4)
    else:
        right = [sum(numbers[: i + 1]) for i in range(4)]
        wrong = list(right)
        place = rng.randrange(1, 4)
        wrong[place] = max(1, wrong[place] + rng.choice([-10, -2, -1, 1, 2, 10]))
    return f"{kind} {' '.join(map(str, numbers))} :", *(" , ".join(map(str, values)) for values in (right, wrong))  # type: ignore[return-value]


class Mixture:
    """Countdown, sort, sums in turns: what the base LM is trained on."""

    name = "mixture"
    words = (*Countdown.words, *NEW)

    def __init__(self) -> None:
        self.countdown = Countdown()

    def demonstrations(self, split: Split) -> Sequence[Demonstration]:
        """A third of each kind."""
        countdown = self.countdown.demonstrations(split)
        first = 0 if split == "train" else 10_000_000  # the rows of the task files lie in between

        def make(index: int) -> Demonstration:
            place, kind = divmod(index, 3)
            if kind == 2:
                return countdown[place]
            return shown(NEW[kind], first + ROWS + place)

        return LazySequence(3 * min(len(countdown), 1_000_000), make)

    def score(self, prompt: Any, text: str) -> Any:
        """Never asked: no update reads solved problems only."""
        raise NotImplementedError


def make_base(folder: Path, updates: int) -> None:
    """The base LM of all three tasks, unless it is there."""
    if (folder / "config.json").is_file():
        return
    config = load_config(ROOT / "configs" / "base_countdown.yaml", [f"base.model={folder}"]).base.train
    assert config is not None
    settings = config.model_copy(update={"updates": updates, "solved_updates": 0})
    train_base(
        settings,
        task=Mixture(),
        folder=folder,
        seed=0,
        threads=1,
        log=lambda step, found: print(step, found, flush=True),
    )  # type: ignore[arg-type]


def shown(kind: str, index: int) -> Demonstration:
    """A problem with a response as the base LM has seen them: right with probability ``SKILL``."""
    prompt, right, wrong = problem(kind, index)
    solved = random.Random(f"skill/{kind}/{index}").random() < SKILL
    return Demonstration(
        prompt=Prompt(id=f"{kind}/{index}", text=prompt, metadata={"answer": right}),
        response=right if solved else wrong,
    )


def task_of(out: Path, kind: str) -> tuple[list[str], list[str]]:
    """Overrides that (make a run one of this task, have its offline stages read responses like the base LM's own)."""
    paths = {name: out / f"{kind}{name}.jsonl" for name in ("", "-like-base")}
    made = {"": lambda index: problem(kind, index)[1], "-like-base": lambda index: shown(kind, index).response}
    for name, path in paths.items():
        if path.is_file():
            continue
        rows = [json.dumps({"prompt": problem(kind, index)[0], "answer": made[name](index)}) for index in range(ROWS)]
        path.write_text("\n".join(rows) + "\n")
    jsonl = {name: f"{{path: {path}, heldout_share: 0.1}}" for name, path in paths.items()}
    data = f"[{{kind: task, task: {{name: jsonl, options: {jsonl['-like-base']}}}}}]"
    return ["task.name=jsonl", f"task.options={jsonl['']}"], [f"actions.data={data}", f"clone.data={data}"]


def codes_of(out: Path, seed: int, way: str) -> Path:
    """Checkpoint of the codes to reuse: found on countdown, or on all three tasks."""
    base = f"base.model={out / 'base'}"
    if way == "reused":
        return cloned(out / "countdown", seed, base)
    paths = [task_of(out, kind)[1] for kind in NEW]
    broad = ", ".join(["{kind: task}", *(setting.partition("=[")[2].removesuffix("]") for setting, _ in paths)])
    return cloned(out / "broad", seed, base, f"actions.data=[{broad}]", f"clone.data=[{broad}]")


def play(out: Path, kind: str, seed: int, way: str) -> tuple[Curve, Curve]:
    """(before reinforcement learning, it)."""
    folder, (task, data) = out / kind, task_of(out, kind)
    settings = [f"base.model={out / 'base'}", *task]
    made = [f"seed={seed}", "improve=null", *settings, *data]
    if way != "retrained":
        made += [f"actions.init={codes_of(out, seed, way)}", "actions.updates=0", f"clone.updates={REUSED_UPDATES}"]
    clone = run(folder / f"{way}-{seed}", made)
    start = clone / "checkpoints" / "clone"
    learned = improved(folder, f"rl-{way}", seed, start, *settings, "improve.epochs=3", f"improve.updates={UPDATES}")
    print(f"{kind}, {way}, seed {seed}: {statistics.mean(learned.rewards[-LAST:]):.3f}", flush=True)
    return curve(clone), learned


def rows_of(kind: str, played: dict[str, list[tuple[Curve, Curve]]]) -> list[dict[str, Any]]:
    """What is reported of a task, ``played`` by way."""

    def of(way: str, stage: str, measure: str) -> list[float]:
        place = 0 if stage == "cloned" else 1
        return [pair[place].summary["evaluation"][stage][measure] for pair in played[way]]

    def seconds(way: str) -> list[float]:
        return [
            sum(float(before.summary["stages"][n]["seconds"]) for n in ("actions", "clone"))
            for before, _ in played[way]
        ]

    rows, best = [], of("retrained", "improved", "sampled")
    for way, name in WAYS.items():
        ends = of(way, "improved", "sampled")
        rows.append(row(f"{kind}, {name}: cross-entropy with codes", of(way, "cloned", "nll_codes")))
        rows.append(row(f"{kind}, {name}: tokens reached per state", of(way, "cloned", "distinct_tokens")))
        rows.append(row(f"{kind}, {name}: before RL, sampled", of(way, "cloned", "sampled")))
        rows.append(row(f"{kind}, {name}: after RL, sampled", ends))
        if way != "retrained":
            rows.append(
                row(f"{kind}, {name}: after RL, over retrained", [a / b for a, b in zip(ends, best, strict=True)])
            )
            cost = [a / b for a, b in zip(seconds(way), seconds("retrained"), strict=True)]
            rows.append(row(f"{kind}, {name}: cost of codes and policy, over retrained", cost))
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / "study")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--base-updates", type=int, default=2000)
    parser.add_argument("--base-only", action="store_true", help="train the base LM and stop")
    arguments = parser.parse_args()
    out = arguments.out.absolute() / "transfer"
    out.mkdir(parents=True, exist_ok=True)
    make_base(out / "base", arguments.base_updates)
    if arguments.base_only:
        return
    for kind in NEW:
        task_of(out, kind)  # before two runs at once want to write them
    side_by_side(
        lambda job: codes_of(out, *job), [(seed, way) for seed in arguments.seeds for way in WAYS if way != "retrained"]
    )
    jobs = [(kind, seed, way) for kind in NEW for seed in arguments.seeds for way in WAYS]
    played = dict(zip(jobs, side_by_side(lambda job: play(out, *job), jobs), strict=True))
    rows = []
    for kind in NEW:
        rows += rows_of(kind, {way: [played[kind, seed, way] for seed in arguments.seeds] for way in WAYS})
    write("transfer", "benchmarks/studies/transfer.py", arguments.seeds, rows)


if __name__ == "__main__":
    main()
