"""Decode, update and feature shipping at the shapes of 0.1, 1 and 8 B parameters, as shares of what this device can do.

    python benchmarks/gpu.py [--device cuda] [--sizes 0.1b 1b 8b] [--repeats 5] [--quick] [--out DIR]

Random weights (speed does not depend on them) in bf16, built on the device. The limits are measured first: bytes/s of a
large copy, FLOP/s of a large bf16 matmul. ``decode``: steady tokens/s of ``generate`` (time of N + 1 new tokens less
that of 1), 8 rollouts per prompt; share of bandwidth = (weights of base, policy and merge once per step + key-value
caches) / copy rate; share of matmul = 2 FLOP per weight and token. ``prefill``: prompt tokens/s, each prompt shared by
8 rollouts. ``update``: forward, backward and AdamW of the policy on features that are there, fp32 masters, bf16
autocast (6 FLOP per weight and token). ``ship``: features device -> host -> padded batch on the device, beside
``recompute``: the base's pass. ``--quick`` is a toy shape.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import arguments, report, spread
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from latent_control import LatentActionLM
from latent_control.config import LatentActionConfig
from latent_control.decoding import generate as decoding
from latent_control.decoding.sampling_params import SamplingParams
from latent_control.distributions import action_log_probs
from latent_control.losses import clipped_surrogate

GROUP = 8


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A base LM and its policy."""

    width: int
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    policy_layers: int


SHAPES = {
    "toy": Shape(width=64, hidden=128, layers=4, heads=4, key_value_heads=2, vocabulary=256, policy_layers=2),
    "0.1b": Shape(width=768, hidden=2048, layers=12, heads=12, key_value_heads=12, vocabulary=32000, policy_layers=2),
    "1b": Shape(width=2048, hidden=8192, layers=16, heads=32, key_value_heads=8, vocabulary=128256, policy_layers=4),
    "8b": Shape(width=4096, hidden=14336, layers=32, heads=32, key_value_heads=8, vocabulary=128256, policy_layers=8),
}


@dataclass(frozen=True, kw_only=True)
class Load:
    """How much work each measurement does."""

    rows: tuple[int, ...]
    prompt: int
    new: int
    update_rows: int
    copy_bytes: int
    matmul: int


FULL = Load(rows=(64, 256), prompt=256, new=128, update_rows=16, copy_bytes=2**31, matmul=8192)
QUICK = Load(rows=(16,), prompt=16, new=8, update_rows=4, copy_bytes=2**22, matmul=256)


class Clock:
    """Times jobs on one device."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def seconds(self, job: Callable[[], object]) -> list[float]:
        """Seconds of each repeat, after one to warm up."""
        return [self._once(job) for _ in range(self.repeats + 1)][1:]

    def _once(self, job: Callable[[], object]) -> float:
        self._wait()
        started = time.perf_counter()
        job()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def limits(clock: Clock, load: Load) -> dict[str, float]:
    """Bytes/s (read and written) and bf16 FLOP/s of this device, the best of the repeats."""
    source = torch.ones(load.copy_bytes // 2, dtype=torch.bfloat16, device=clock.device)
    target = torch.empty_like(source)
    left = torch.randn(load.matmul, load.matmul, device=clock.device).bfloat16()
    return {
        "bytes_per_second": 2 * load.copy_bytes / min(clock.seconds(lambda: target.copy_(source))),
        "flop_per_second": 2 * load.matmul**3 / min(clock.seconds(lambda: left @ left)),
    }


def build(shape: Shape, device: torch.device) -> LatentActionLM:
    """A random model on ``device``: base in bf16, new modules in fp32, no inverse dynamics model."""
    settings = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=4096,
    )
    standard = torch.get_default_dtype()
    with device:
        torch.set_default_dtype(torch.bfloat16)
        try:
            lm = LlamaForCausalLM(settings).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(standard)
        config = LatentActionConfig(
            num_actions=64, policy_layers=shape.policy_layers, inverse_dynamics_layers=shape.policy_layers
        )
        return LatentActionLM(lm, config, inverse_dynamics=False).eval()


def weights(module: nn.Module) -> int:
    """Parameters that take part in matmuls: all but the input embedding."""
    return sum(p.numel() for name, p in module.named_parameters() if "embed_tokens" not in name)


def decode(
    model: LatentActionLM, shape: Shape, load: Load, rows: int, clock: Clock, limit: dict[str, float], *, static: bool
) -> list[dict[str, Any]]:
    """Steady decoding and prefill with ``rows`` rows at once; ``static`` by CUDA graphs (on a processor: without)."""
    prompts = torch.randint(3, shape.vocabulary, (rows // GROUP, load.prompt), device=clock.device)

    def generate(new: int) -> None:
        with torch.inference_mode():
            params = SamplingParams(max_new_tokens=new, repeats=GROUP, batch_size=rows, seed=0, stop_token=-1)
            decoding.generate(model.base, model.actor(), params, prompts, static=static)

    first = sorted(clock.seconds(lambda: generate(1)))
    steady = [s - first[len(first) // 2] for s in clock.seconds(lambda: generate(load.new + 1))]
    read = weights(model)
    cached = (
        2
        * shape.key_value_heads
        * shape.width
        // shape.heads
        * (shape.layers + shape.policy_layers)
        * (load.prompt + load.new / 2)
    )
    moved, flop = 2 * (read + rows * cached), 2 * read * rows
    rates = [rows * load.new / s for s in steady]
    steps = sorted(rates)[len(rates) // 2] / rows
    line = {
        "tokens/s": spread(rates),
        "share of bandwidth": moved * steps / limit["bytes_per_second"],
        "share of matmul": flop * steps / limit["flop_per_second"],
        "raw": rates,
    }
    prefilled = [prompts.numel() / s for s in first]
    prefill = {
        "tokens/s": spread(prefilled),
        "share of bandwidth": 0.0,
        "share of matmul": 2
        * (weights(model.base.decoder) + weights(model.policy))
        * sorted(prefilled)[len(first) // 2]
        / limit["flop_per_second"],
        "raw": prefilled,
    }
    if static:
        return [{"what": f"decode static, {rows} rows", **line}]
    return [{"what": f"decode, {rows} rows", **line}, {"what": f"prefill, {rows // GROUP} x {load.prompt}", **prefill}]


def update(model: LatentActionLM, shape: Shape, load: Load, clock: Clock, limit: dict[str, float]) -> dict[str, Any]:
    """One optimiser step of the policy on features that are there."""
    rows, length = load.update_rows, load.prompt + load.new
    policy = model.policy.float().train()
    optimizer = torch.optim.AdamW(policy.trainable(), lr=1e-5, fused=clock.device.type == "cuda")
    features = torch.randn(rows, length, shape.width, device=clock.device).bfloat16()
    actions = torch.randint(64, (rows * length,), device=clock.device)
    logp = torch.full((rows * length,), -4.16, device=clock.device)

    def step() -> None:
        with torch.autocast(clock.device.type, dtype=torch.bfloat16):
            logits = policy.head(policy.hidden(features.float()).flatten(0, 1))
        loss, _ = clipped_surrogate(
            action_log_probs(logits.float(), temperature=1.0, top_k=None, keep=actions),
            actions=actions,
            action_logp=logp,
            advantages=torch.ones_like(logp),
            weights=torch.full_like(logp, 1 / len(logp)),
            clip_low=0.2,
            clip_high=0.2,
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    rates = [rows * length / s for s in clock.seconds(step)]
    share = 6 * weights(policy) * sorted(rates)[len(rates) // 2] / limit["flop_per_second"]
    return {
        "what": f"update, {rows} x {length}",
        "tokens/s": spread(rates),
        "share of bandwidth": 0.0,
        "share of matmul": share,
        "raw": rates,
    }


def ship(
    model: LatentActionLM, shape: Shape, load: Load, clock: Clock, limit: dict[str, float]
) -> list[dict[str, Any]]:
    """Moving features by way of the host, and computing them again."""
    rows, length = load.update_rows, load.prompt + load.new
    made = torch.randn(rows, length, shape.width, device=clock.device).bfloat16()
    tokens = torch.randint(3, shape.vocabulary, (rows, length), device=clock.device)

    def there_and_back() -> None:
        arrays = [row.cpu().view(torch.uint16).numpy().copy() for row in made]  # the copy stands for the object store
        torch.stack([torch.from_numpy(a).view(torch.bfloat16) for a in arrays]).to(clock.device)

    def recompute() -> None:
        with torch.inference_mode():
            model.features(tokens)

    shipped = [rows * length / s for s in clock.seconds(there_and_back)]
    again = [rows * length / s for s in clock.seconds(recompute)]
    gigabytes = sorted(shipped)[len(shipped) // 2] * shape.width * 2 / 1e9
    flop = 2 * weights(model.base.decoder) * sorted(again)[len(again) // 2]
    return [
        {
            "what": f"ship, {gigabytes:.2f} GB/s",
            "tokens/s": spread(shipped),
            "share of bandwidth": 0.0,
            "share of matmul": 0.0,
            "raw": shipped,
        },
        {
            "what": f"recompute, {rows} x {length}",
            "tokens/s": spread(again),
            "share of bandwidth": 0.0,
            "share of matmul": flop / limit["flop_per_second"],
            "raw": again,
        },
    ]


def main() -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), help="default: all on a GPU, toy with --quick")
    options = parser.parse_args()
    device, load = torch.device(options.device), QUICK if options.quick else FULL
    clock = Clock(device, options.repeats)
    limit = limits(clock, load)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(
        f"{name}: copy {limit['bytes_per_second'] / 1e9:.0f} GB/s, bf16 matmul "
        f"{limit['flop_per_second'] / 1e12:.2f} TFLOP/s",
        flush=True,
    )
    lines: list[dict[str, Any]] = []
    for size in options.sizes or (["toy"] if options.quick else ["0.1b", "1b", "8b"]):
        model = build(SHAPES[size], device)
        model.cast_modules()
        ways = [(rows, static) for rows in load.rows for static in (False, True)]
        found = [
            line
            for rows, static in ways
            for line in decode(model, SHAPES[size], load, rows, clock, limit, static=static)
        ]
        found += ship(model, SHAPES[size], load, clock, limit)
        found.append(update(model, SHAPES[size], load, clock, limit))
        lines += [{"size": size, **line} for line in found]
        print(
            *[f"{line['size']} {line['what']}: {line['tokens/s']} tokens/s" for line in lines[-len(found) :]],
            sep="\n",
            flush=True,
        )
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    rows = [
        {k: (f"{v:.1%}" if v else "") if k.startswith("share") else v for k, v in line.items() if k != "raw"}
        for line in lines
    ]
    report("gpu", rows, {"device": name, "limits": limit, "measured": lines}, options.out)


if __name__ == "__main__":
    main()
