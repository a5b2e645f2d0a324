"""How far stored log-probabilities lie from those of a pass over the finished rows, by number type; what looking costs;
what a fault shows.

    python benchmarks/rescoring.py [--models tiny smollm2] [--repeats 5] [--quick] [--out DIR]

A request is 8 random prompts x 8 rollouts, decoded on 32 slots, lengths geometric with mean 16 in 4..48. The policy's
head is scaled until its codes have a perplexity of about 8 of 64, as a cloned policy's: differences grow with what a
policy tells apart. ``sound``: mean difference over all rows of a request, median and extremes over requests. ``mixed
up``: the same where rows that enter read others' tokens, which is what the engine did until November 2026. ``cost``:
seconds to score 1 of 32 rows again / seconds to decode.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from common import arguments, report, spread
from decode import wanted_lengths
from models import latent_model

from latent_control import Generation, LatentActionLM
from latent_control.decoding.engine import Engine
from latent_control.decoding.generate import generate
from latent_control.decoding.rescoring import mismatch_bound, rescored_logp
from latent_control.decoding.sampling_params import SamplingParams

PROMPTS, GROUP, SLOTS, PROMPT, SHARE, PERPLEXITY = 8, 8, 32, 24, 32, 8.0
# (model, base's number type, policy's)
CASES = [
    ("tiny", "float32", "float32"),
    ("smollm2", "float32", "float32"),
    ("smollm2", "bfloat16", "float32"),
    ("smollm2", "bfloat16", "bfloat16"),
    ("smollm2", "float16", "float16"),
]


@contextmanager
def mixed_up() -> Iterator[None]:
    """The engine writes the tokens of a step in the order of its rows, whichever slots they are in."""
    choose = Engine._choose

    def faulty(self: Engine, slots: list[int], final: torch.Tensor | None, logits: torch.Tensor) -> None:
        before = self.next_tokens.clone()
        choose(self, slots, final, logits)
        if len(slots) == len(self.rows_in) and slots[-1] == len(slots) - 1 and slots != sorted(slots):
            self.next_tokens = before
            self.next_tokens[: len(slots)] = self.chosen[-1][2]

    with patch.object(Engine, "_choose", faulty):
        yield


def scaled(model: LatentActionLM, prompts: torch.Tensor) -> None:
    """Scale the policy's head until the mean perplexity over codes is ``PERPLEXITY``."""
    assert model.policy is not None
    logits = model.policy_logits(model.features(prompts)).float()
    low, high = 0.0, 1e4
    for _ in range(40):
        middle = (low + high) / 2
        log_probs = (logits * middle).log_softmax(-1)
        perplexity = float((-(log_probs.exp() * log_probs).sum(-1)).exp().mean())
        low, high = (middle, high) if perplexity > PERPLEXITY else (low, middle)
    model.policy.head.weight.data *= middle


def request(model: LatentActionLM, number: int, lengths: list[int]) -> tuple[torch.Tensor, Generation, float]:
    """(prompts, rollouts, seconds)"""
    prompts = torch.randint(3, 150, (PROMPTS, PROMPT), generator=torch.Generator().manual_seed(number))
    started = time.perf_counter()
    with torch.inference_mode():
        out = generate(
            model.base,
            model.actor(),
            SamplingParams(max_new_tokens=lengths, batch_size=SLOTS, repeats=GROUP, seed=number, stop_token=-1),
            prompts,
        )
    return prompts, out, time.perf_counter() - started


def rescored(model: LatentActionLM, prompts: torch.Tensor, out: Generation, rows: list[int]) -> tuple[float, float]:
    """(mean difference, seconds) of these rows."""
    lengths = out.lengths.tolist()
    started = time.perf_counter()
    found = rescored_logp(
        model.base,
        model.actor(),
        [prompts[row // GROUP].tolist() for row in rows],
        [out.tokens[row, : lengths[row]].tolist() for row in rows],
        [out.actions[row, : lengths[row]].tolist() for row in rows],
        temperature=1.0,
        top_k=None,
    )
    seconds = time.perf_counter() - started
    gaps = [(logp - out.action_logp[row, : lengths[row]]).abs() for row, logp in zip(rows, found, strict=True)]
    return float(torch.cat(gaps).mean()), seconds


def main() -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["tiny", "smollm2"], choices=["tiny", "smollm2"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines, raw = [], {}
    lengths = wanted_lengths(PROMPTS * GROUP, True, 6 if options.quick else 48)
    for name, base, policy in [case for case in CASES if case[0] in options.models]:
        model = latent_model(name).to(getattr(torch, base))
        model.inverse_dynamics = None
        assert model.policy is not None
        scaled(model, torch.randint(3, 150, (8, PROMPT)))
        model.policy.to(getattr(torch, policy))
        sound, faulty, costs = [], [], []
        for number in range(options.repeats):
            prompts, out, decoding = request(model, number, lengths)
            sound.append(rescored(model, prompts, out, list(range(len(lengths))))[0])
            costs.append(rescored(model, prompts, out, list(range(number % SHARE, len(lengths), SHARE)))[1] / decoding)
            with mixed_up():
                prompts, out, _ = request(model, number, lengths)
            faulty.append(rescored(model, prompts, out, list(range(len(lengths))))[0])
        case = f"{name}, base {base}, policy {policy}"
        raw[case] = {"sound": sound, "mixed_up": faulty, "cost": costs}
        bound = mismatch_bound(getattr(torch, base), getattr(torch, policy))
        cells = {"sound": spread(sound), "mixed up": spread(faulty), "bound": bound, "cost": spread(costs)}
        lines.append({"model": case, **cells})
        print(lines[-1], flush=True)
    report("rescoring", lines, {"measured": raw}, options.out)


if __name__ == "__main__":
    main()
