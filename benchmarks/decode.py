"""Decoding: tokens/s of the latent policy's engine against ``generate`` of transformers on the bare base LM.

    python benchmarks/decode.py [--models tiny smollm2] [--repeats 5] [--quick] [--out DIR]

Both sides: one process, one torch thread, the same prompts (24 tokens), the same wanted length per row, sampling at
temperature 1, no end token, the same rows at once (``batch``), weights in the same precision. Ours does more work per
token: base, policy, merge.
``groups of 8``: 8 rollouts per prompt, as RL samples (``generate`` gets ``num_return_sequences=8``); ``single``: all
prompts differ. Mixed lengths are geometric with mean 16, cut to 4..48 (seed 0); equal lengths are 32. There are 4
batches' worth of rows. ``generate`` runs batch after batch, each until its longest row is done; only wanted tokens
count. As an oracle, ``sorted`` rows give ``generate`` batches of rows of similar length, which nobody can know
beforehand.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from common import alternate, arguments, ratio, report, spread
from models import latent_model

from latent_control import LatentActionLM

PROMPT, BATCHES, GROUP = 24, 4, 8


def wanted_lengths(rows: int, mixed: bool, longest: int) -> list[int]:
    """New tokens per row."""
    if not mixed:
        return [longest * 2 // 3] * rows
    return np.clip(np.random.default_rng(0).geometric(3 / longest, rows), 4, longest).tolist()


def ours(model: LatentActionLM, prompts: torch.Tensor, lengths: Sequence[int], batch: int, repeats: int) -> float:
    """Tokens/s of this project's engine."""
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(prompts, max_new_tokens=lengths, batch_size=batch, repeats=repeats, seed=0, stop_token=-1)
    return sum(lengths) / (time.perf_counter() - started)


def plain(
    model: LatentActionLM,
    prompts: torch.Tensor,
    lengths: Sequence[int],
    batch: int,
    repeats: int,
    *,
    oracle: bool = False,
) -> float:
    """Tokens/s of ``generate``."""
    lm = model.base.lm
    rows = sorted(range(len(lengths)), key=lambda row: lengths[row]) if oracle else list(range(len(lengths)))
    if oracle:  # rows of a group no longer lie together
        prompts, repeats = prompts.repeat_interleave(repeats, 0)[rows], 1
    started = time.perf_counter()
    with torch.inference_mode():
        for first in range(0, len(rows), batch):
            part = prompts[first // repeats : (first + batch) // repeats]
            longest = max(lengths[row] for row in rows[first : first + batch])
            lm.generate(
                part,
                attention_mask=torch.ones_like(part),
                do_sample=True,
                top_k=0,
                min_new_tokens=longest,
                max_new_tokens=longest,
                num_return_sequences=repeats,
                pad_token_id=0,
            )
    return sum(lengths) / (time.perf_counter() - started)


def main() -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["tiny", "smollm2"], choices=["tiny", "smollm2"])
    parser.add_argument("--batches", nargs="+", type=int, help="rows at once (default: 64 and 128 tiny, 16 SmolLM2)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines, raw = [], {}
    for name in options.models:
        model = latent_model(name)
        model.inverse_dynamics = None
        model.cast_modules()
        for batch in options.batches or ([16] if options.quick else [64, 128] if name == "tiny" else [16]):
            for mixed, repeats in [(True, GROUP), (True, 1), (False, GROUP), (False, 1)]:
                lengths = wanted_lengths(batch * (1 if options.quick else BATCHES), mixed, 6 if options.quick else 48)
                generator = torch.Generator().manual_seed(1)
                prompts = torch.randint(3, 150, (len(lengths) // repeats, PROMPT), generator=generator)
                job = (model, prompts, lengths, batch, repeats)
                sides = {"ours": lambda job=job: ours(*job), "generate": lambda job=job: plain(*job)}
                if mixed:
                    sides["sorted"] = lambda job=job: plain(*job, oracle=True)
                rates = alternate(sides, options.repeats)
                case = (
                    f"{name}, batch {batch}, {'mixed' if mixed else 'equal'}, "
                    f"{'groups of 8' if repeats > 1 else 'single'}"
                )
                raw[case] = {
                    "mean_length": sum(lengths) / len(lengths),
                    "longest": max(lengths),
                    "tokens_per_second": rates,
                }
                lines.append(
                    {
                        "case": case,
                        "mean / longest": f"{sum(lengths) / len(lengths):.1f} / {max(lengths)}",
                        "ours, tokens/s": spread(rates["ours"]),
                        "generate": spread(rates["generate"]),
                        "ours / generate": spread(list(ratio(rates["ours"], rates["generate"]).values())),
                        "ours / generate, sorted": spread(list(ratio(rates["ours"], rates["sorted"]).values()))
                        if mixed
                        else "",
                    }
                )
                print(lines[-1], flush=True)
    report("decode", lines, {"measured": raw}, options.out)


if __name__ == "__main__":
    main()
