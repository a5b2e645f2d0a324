"""Responses/s of a reasoning-gym verifier through its isolation, against the same verifier called in the process
itself.

    python benchmarks/verifiers.py [--repeats 9] [--quick] [--out DIR]

``reasoning_gym/countdown``, batches of 128 distinct responses, 8 batches a round, the same in every round. Arithmetic:
right answers and, for every other prompt, one with its last number reversed: they share a fork. Mixed: one response in
eight is a sentence, which has a fork of its own. Sentences: all of them, two batches. The process itself has no walls
and no limits: it calls ``score_answer`` in a loop, as the project did before. Forks run at once on as many CPUs as the
process has; ``one fork at a time`` sets ``limits.parallel: 1``. A round to warm up loads the parent of the forks.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

from common import alternate, arguments, ratio, report, spread
from reasoning_gym import create_dataset

from configs.schema import TaskConfig
from rollout_workers.tasks import Prompt, Score, build_task, score_all
from rollout_workers.tasks.reasoning_gym import extract_answer

BATCH = 128


def batches(prompts: Sequence[Prompt], gold: Sequence[str], sentences: float) -> list[list[tuple[Prompt, str]]]:
    """Distinct responses: gold answers and, of every other prompt, the answer with two numbers swapped; a share are
    sentences."""
    rng = random.Random(0)
    pairs = []
    for place, (prompt, answer) in enumerate(zip(prompts, gold, strict=True)):
        words = answer.split()
        text = answer if place % 2 else " ".join([*words[:-1], f"{words[-1]}"[::-1]])
        pairs.append((prompt, f"The answer is {text}" if rng.random() < sentences else text))
    return [pairs[start : start + BATCH] for start in range(0, len(pairs), BATCH)]


def bare(asked: Sequence[Sequence[tuple[Prompt, str]]]) -> Callable[[], float]:
    """Rate of the loop in this process."""
    dataset = create_dataset("countdown", seed=0, size=20_000)

    def run() -> float:
        started = time.perf_counter()
        for batch in asked:
            for prompt, text in batch:
                float(dataset.score_answer(extract_answer(text), prompt.metadata["entry"]))
        return sum(map(len, asked)) / (time.perf_counter() - started)

    return run


def isolated(asked: Sequence[Sequence[tuple[Prompt, str]]], parallel: int | None) -> Callable[[], float]:
    """Rate of the task's own ``score_batch``."""
    task = build_task(
        TaskConfig(name="reasoning_gym/countdown", options={"limits": {"parallel": parallel, "seconds": 60}})
    )

    def run() -> float:
        started = time.perf_counter()
        for batch in asked:
            verdicts = score_all(task, [prompt for prompt, _ in batch], [text for _, text in batch])
            assert all(isinstance(verdict, Score) for verdict in verdicts)
        return sum(map(len, asked)) / (time.perf_counter() - started)

    return run


def main() -> None:
    """Command line."""
    options = arguments(__doc__, repeats=9).parse_args()
    count = BATCH * (1 if options.quick else 8)
    task = build_task(TaskConfig(name="reasoning_gym/countdown"))
    demonstrations = list(task.demonstrations("train")[:count])
    prompts, gold = [d.prompt for d in demonstrations], [d.response for d in demonstrations]
    rows, raw = [], {}
    for name, sentences in (("arithmetic", 0.0), ("mixed", 0.125), ("sentences", 1.0)):
        asked = batches(prompts, gold, sentences)
        if sentences == 1.0:
            asked = asked[:2]  # slow enough
        sides = {
            "in the process": bare(asked),
            "isolated": isolated(asked, None),
            "one fork at a time": isolated(asked, 1),
        }
        rates = raw[name] = alternate(sides, options.repeats)
        for side in ("isolated", "one fork at a time"):
            share = spread([x / y for x, y in zip(rates[side], rates["in the process"], strict=True)])
            rows.append(
                {
                    "responses": name,
                    "side": side,
                    "responses/s": spread(rates[side]),
                    "in the process, responses/s": spread(rates["in the process"]),
                    "isolated / in the process": share,
                }
            )
        print(name, ratio(rates["isolated"], rates["in the process"]), flush=True)
    report("verifiers", rows, {"responses_per_second": raw}, options.out)


if __name__ == "__main__":
    main()
