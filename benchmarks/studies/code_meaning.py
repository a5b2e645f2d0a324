"""How much does a code tell of its token whatever the context? Mutual information by place in countdown's response.

    python benchmarks/studies/code_meaning.py runs/study/codes-64-1/cloned-0/checkpoints/clone

Samples 8 rollouts of the checkpoint's policy for each of 400 training prompts. A code that means the same in every
context tells much; one that is a name in one context only tells little, and what reinforcement learning learns about it
does not carry over.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from latent_control import LatentActionLM
from latent_control.pretrained import base_path
from latent_control.text import encode_text, load_tokenizer
from rollout_workers.tasks.countdown import Countdown

PROMPTS, SAMPLES, LONGEST = 400, 8, 12


def entropy(values: Counter[object]) -> float:
    """In nats."""
    shares = np.array(list(values.values()), float) / values.total()
    return float(-(shares * np.log(shares)).sum())


def rollouts(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, codes), each [rollouts, LONGEST]."""
    model, tokenizer = LatentActionLM.from_pretrained(folder), load_tokenizer(base_path(folder))
    prompts = Countdown().prompts("train")
    rows = [encode_text(tokenizer, prompts[index].text, chat=False) for index in range(PROMPTS)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    found = model.generate(ids, mask, max_new_tokens=LONGEST, seed=0, repeats=SAMPLES)
    return found.tokens.numpy(), found.actions.numpy()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    for folder in parser.parse_args().checkpoints:
        tokens, codes = rollouts(folder)
        print(folder, "nats by place: H(token), I(code; token)")
        for place in range(LONGEST):
            kinds, names = Counter(tokens[:, place]), Counter(codes[:, place])
            both = Counter(zip(tokens[:, place], codes[:, place], strict=True))
            print(f"{place:2d} {entropy(kinds):.2f} {entropy(kinds) + entropy(names) - entropy(both):.2f}")


if __name__ == "__main__":
    main()
