"""TRL's GRPOTrainer on one of our tasks, as a peer of ``benchmarks/trl_grpo.py`` and ``studies/trl_lora.py`` there:
asked for n, it trains n optimiser steps and answers their seconds.

Run by an environment with TRL and torch. Given its best: no dropout, no gradient checkpointing, no reference model, one
generation per update, no logging, the number type of the other side.
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
from rollout_workers.tasks.instructions import Instructions

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


def adapter(rank: int) -> Any:
    """LoRA on all linear layers, as TRL's guide has it."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def main() -> None:
    """``settings``: base, max_new_tokens, fixed_length, prompts, group, learning_rate, threads; ``task``: instructions
    (chats) in place of countdown; ``lora_rank``; ``first`` prompt; ``dtype``, else float32; the
    ``parts`` that a batch's gradient is computed in, else one."""
    settings = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the trainer prints; its lines must not get between the answers
    torch.set_num_threads(settings["threads"])
    rounds, chat = Rounds(answers), settings.get("task") == "instructions"
    task = Instructions() if chat else Countdown()
    batch, parts = settings["prompts"] * settings["group"], settings.get("parts", 1)
    first, dtype = settings.get("first", 0), settings.get("dtype", "float32")
    prompts = [task.prompts("train")[index] for index in range(first, first + PROMPTS)]
    rows = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": p.text}] if chat else p.text, "index": index}
            for index, p in enumerate(prompts)
        ]
    )
    lora = {"peft_config": adapter(settings["lora_rank"])} if "lora_rank" in settings else {}

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
            per_device_train_batch_size=batch // parts,
            gradient_accumulation_steps=parts,
            num_generations=settings["group"],
            max_completion_length=settings["max_new_tokens"],
            generation_kwargs={"min_new_tokens": settings["max_new_tokens"]} if settings["fixed_length"] else None,
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="constant",
            max_steps=1_000_000,
            bf16=dtype == "bfloat16",
            model_init_kwargs={"dtype": dtype},
            use_cpu=True,
            gradient_checkpointing=False,
            disable_dropout=True,
            logging_steps=1_000_000,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=settings["base"], reward_funcs=reward, args=config, train_dataset=rows, callbacks=[rounds], **lora
        )
        trainer.train()


if __name__ == "__main__":
    main()
