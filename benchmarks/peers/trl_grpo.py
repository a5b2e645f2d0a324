"""TRL's GRPOTrainer on countdown, as a peer of ``benchmarks/trl_grpo.py``: asked for n, it trains n updates and answers
their seconds.

Run by an environment with TRL and torch. Given its best: no dropout, no gradient checkpointing, no reference model, one
generation per update, no logging, fp32 as the other side.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rollout_workers.tasks.countdown import Countdown
from rollout_workers.tasks.encoding import decode_response

PROMPTS = 4096


class Rounds(TrainerCallback):
    """Holds the trainer before an update until asked for more, and answers when the last one of a round is done."""

    def __init__(self, answers: Any) -> None:
        self.left, self.started, self.answers = 0, 0.0, answers
        self.rewards: list[float] = []
        self.lengths: list[int] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Wait for work."""
        if self.left == 0:
            line = sys.stdin.readline()
            if not line:
                sys.exit()
            self.left, self.started = json.loads(line), time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Count down."""
        self.left -= 1
        if self.left == 0:
            seconds = time.perf_counter() - self.started
            means = {name: sum(v) / len(v) for name, v in (("reward", self.rewards), ("tokens", self.lengths))}
            self.rewards.clear()
            self.lengths.clear()
            self.answers.write(json.dumps({"seconds": seconds, **means}) + "\n")
            self.answers.flush()


def main() -> None:
    """``settings``: base, max_new_tokens, fixed_length, prompts, group, learning_rate, threads."""
    settings = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the trainer prints; its lines must not get between the answers
    torch.set_num_threads(settings["threads"])
    rounds, task = Rounds(answers), Countdown()
    prompts = [task.prompts("train")[index] for index in range(PROMPTS)]
    rows = Dataset.from_list([{"prompt": p.text, "index": index} for index, p in enumerate(prompts)])

    def reward(completion_ids: list[list[int]], index: list[int], **_: Any) -> list[float]:
        scores = [
            task.score(prompts[i], decode_response(trainer.processing_class, ids)).reward
            for i, ids in zip(index, completion_ids, strict=True)
        ]
        rounds.rewards += scores
        rounds.lengths += map(len, completion_ids)
        return scores

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=settings["prompts"] * settings["group"],
            num_generations=settings["group"],
            max_completion_length=settings["max_new_tokens"],
            generation_kwargs={"min_new_tokens": settings["max_new_tokens"]} if settings["fixed_length"] else None,
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="constant",
            max_steps=1_000_000,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            disable_dropout=True,
            logging_steps=1_000_000,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=settings["base"], reward_funcs=reward, args=config, train_dataset=rows, callbacks=[rounds]
        )
        trainer.train()


if __name__ == "__main__":
    main()
