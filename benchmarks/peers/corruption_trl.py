"""TRL's GRPOTrainer before damaged checkpoints, as a peer of ``benchmarks/corruption.py``: it answers with a row per
case.

Run by an environment with TRL and torch. Resuming is TRL's own: ``train(resume_from_checkpoint=True)``, which takes the
newest folder.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from damage import DAMAGES, EMPTY_FOLDER, HALF_FOLDER, half, heard, tried

from rollout_workers.tasks.countdown import Countdown

LOGGERS = ("transformers", "trl", "accelerate", "torch", "")
UPDATES, EVERY = 6, 2


def train(base: str, folder: Path, *, resume: bool, updates: int) -> dict[str, torch.Tensor]:
    """The weights after ``updates``, from the newest checkpoint in ``folder`` or from the start."""
    task = Countdown()
    rows = Dataset.from_list([{"prompt": task.prompts("train")[i].text} for i in range(64)])
    config = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=4,
        max_steps=updates,
        save_steps=EVERY,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1000,
        seed=0,
    )

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(sum(ids) % 7) for ids in completion_ids]

    trainer = GRPOTrainer(model=base, reward_funcs=reward, args=config, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def main() -> None:
    """``settings``: base, threads, quick."""
    settings = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the trainer prints
    torch.set_num_threads(settings["threads"])
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        stem = work / "stem"
        whole = train(settings["base"], stem, resume=False, updates=UPDATES)
        shutil.rmtree(stem / f"checkpoint-{UPDATES}")  # it was killed after update 5: checkpoints 2 and 4 are there
        newest = f"checkpoint-{UPDATES - EVERY}"
        sizes = {path.name: path.stat().st_size for path in sorted((stem / newest).iterdir()) if path.is_file()}
        if settings["quick"]:
            sizes = dict(list(sizes.items())[:1])

        def again() -> dict[str, torch.Tensor]:
            return train(settings["base"], work / "case", resume=True, updates=UPDATES)

        def prepared() -> Path:
            shutil.rmtree(work / "case", ignore_errors=True)
            shutil.copytree(stem, work / "case")
            return work / "case"

        prepared()
        with heard(*LOGGERS) as usual:
            undamaged = again()

        def same() -> bool:
            found = again()
            return all(torch.equal(found[key], undamaged[key]) for key in undamaged)

        rows = []
        for file in sizes:
            for damage, hurt in DAMAGES.items():
                hurt(prepared() / newest / file)
                rows.append(tried((file, damage), same, set(usual), *LOGGERS))
        newer = f"checkpoint-{UPDATES - 1}"
        (prepared() / newer).mkdir()
        rows.append(tried(("folder", EMPTY_FOLDER), same, set(usual), *LOGGERS))
        case = prepared()
        half(case / newest, case / newer)
        rows.append(tried(("folder", HALF_FOLDER), same, set(usual), *LOGGERS))
        exact = all(torch.equal(whole[key], undamaged[key]) for key in whole)
        sys.stdin.readline()
        answers.write(json.dumps({"rows": rows, "undamaged resume equals the uninterrupted run": exact}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
