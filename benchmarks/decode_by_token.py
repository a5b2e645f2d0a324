"""Greedy by token (``decode="token"``, the mixture over the k likeliest codes) beside greedy by code: tokens/s and, of
trained policies, what each k finds.

    python benchmarks/decode_by_token.py [--models tiny smollm2] [--runs RUN ...] [--repeats 5] [--quick] [--out DIR]

All sides in one process and one torch thread: prompts of 4 tokens; 32 rows of 16 new ones (tiny) or 4 of 8
(SmolLM2), no end token, 64 codes, two merge blocks; a side's rate over that of ``by code`` in the same round. Seconds
are the processor's, which other processes disturb less than the wall's. With ``--runs``, per policy of each run:
success on the held-out prompts by code and by k, and the share of responses that are those of the sum over all codes,
token for token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import alternate, arguments, ratio, report, spread
from models import latent_model

from latent_control import LatentActionLM

PROMPT, SIZES = 4, {"tiny": (32, 16), "smollm2": (4, 8)}
SIDES: dict[str, dict[str, Any]] = {"by code": {}} | {
    f"k = {count or 'all'}": {"decode": "token", "mixture_codes": count} for count in (2, 4, 8, 16, None)
}


def rate(model: LatentActionLM, prompts: torch.Tensor, new: int, settings: dict[str, Any]) -> float:
    """Tokens per second of processor time of a greedy decode."""
    started = time.process_time()
    with torch.inference_mode():
        model.generate(prompts, max_new_tokens=new, temperature=0.0, stop_token=-1, **settings)
    return len(prompts) * new / (time.process_time() - started)


def speed(name: str, batch: int, new: int, repeats: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """(row of the table, rates of each side)"""
    model = latent_model(name)
    model.inverse_dynamics = None
    model.cast_modules()
    prompts = torch.randint(3, 150, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
    sides: dict[str, Callable[[], float]] = {s: partial(rate, model, prompts, new, how) for s, how in SIDES.items()}
    rates = alternate(sides, repeats)
    row = {"case": f"{name}, {batch} rows", "by code, tokens/s": spread(rates["by code"])}
    return row | {
        f"{side} / by code": spread(list(ratio(rates[side], rates["by code"]).values())) for side in list(SIDES)[1:]
    }, rates


def quality(run_dir: Path, stage: str, count: int | None) -> dict[str, Any]:
    """Success by side of a run's policy, and the share of responses as with all codes."""
    from pipeline import open_run
    from rollout_workers.tasks import Score, build_task
    from rollout_workers.tasks.encoding import decode_response, encode_prompt
    from rollout_workers.tasks.protocol import score_all

    run = open_run(run_dir)
    model, tokenizer, task = run.model(stage), run.tokenizer(), build_task(run.config.task)
    heldout = task.prompts("heldout")
    prompts = [heldout[i] for i in range(count or min(512, len(heldout)))]
    rows = [encode_prompt(tokenizer, prompt, chat=run.config.task.chat) for prompt in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    texts = {}
    for side, how in SIDES.items():
        with torch.inference_mode():
            out = model.generate(ids, mask, max_new_tokens=run.config.rollout.max_new_tokens, temperature=0.0, **how)
        texts[side] = [
            decode_response(tokenizer, row[:length])
            for row, length in zip(out.tokens.tolist(), out.lengths.tolist(), strict=True)
        ]
    found: dict[str, Any] = {"case": f"{run_dir.name}, {stage}"}
    for side, responses in texts.items():
        verdicts = score_all(task, prompts, responses)
        success = sum(isinstance(v, Score) and v.success for v in verdicts) / len(prompts)
        same = sum(a == b for a, b in zip(responses, texts["k = all"], strict=True)) / len(prompts)
        found |= {side: f"{success:.3f} ({same:.3f})"}
    return found


def main() -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="*", default=["tiny", "smollm2"], choices=["tiny", "smollm2"])
    parser.add_argument("--runs", nargs="*", default=[], type=Path, help="run folders: success of clone and improve")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines, measured = [], {}
    for name in options.models:
        batch, new = (2, 3) if options.quick else SIZES[name]
        row, rates = speed(name, batch, new, options.repeats)
        lines.append(row)
        measured[row["case"]] = rates
        print(row, flush=True)
    policies = [(run, stage) for run in options.runs for stage in ("clone", "improve")]
    found = [quality(run, stage, 8 if options.quick else None) for run, stage in policies]
    for row in found:
        print(row, flush=True)
    report("decode_by_token", lines or found, {"measured": measured, "success": found}, options.out)


if __name__ == "__main__":
    main()
