"""Decoding by vLLM against the built-in engine: tokens/s on the same latent-action model.

    python benchmarks/vllm_decode.py [--models tiny smollm2] [--threads 2] [--repeats 5] [--quick] [--out DIR]

Run it with the interpreter of vLLM's environment (``docs/vllm.md``). Both sides live in one process, take turns, and do
the same: 64 rows at once, prompts of 24 tokens in groups of 8, no end token, weights and policy in the same precision,
64 random codes; the built-in engine decodes with as many threads. Mixed lengths are geometric with mean 16, cut to
4..48; equal lengths are 32.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from common import alternate, arguments, ratio, report, spread
from decode import GROUP, PROMPT, ours, wanted_lengths
from models import DTYPE, latent_model

from configs.schema import RolloutConfig
from rollout_workers.engines import DecodeJob
from rollout_workers.engines.vllm import VllmEngine
from rollout_workers.rollouts import HostSpec


def by_vllm(engine: VllmEngine, prompts: torch.Tensor, lengths: list[int]) -> float:
    """Tokens/s of vLLM; what it has cached of the prompts is dropped first."""
    engine.llm.reset_prefix_cache()
    job = DecodeJob(
        prompts=tuple(map(tuple, prompts.tolist())),
        repeats=GROUP,
        seeds=tuple(range(len(lengths))),
        max_new_tokens=max(lengths),
    )
    started = time.perf_counter()
    found = engine.decode(job, lengths)
    assert found.lengths.tolist() == lengths
    return sum(lengths) / (time.perf_counter() - started)


def main() -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["tiny", "smollm2"], choices=["tiny", "smollm2"])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batch, lines, raw = 8 if options.quick else 64, [], {}
    name = options.models[0]
    for name in options.models:
        model = latent_model(name)
        with tempfile.TemporaryDirectory() as folder:
            spec = HostSpec(
                level="latent", checkpoint=str(model.save_pretrained(Path(folder) / "latent")), dtype=DTYPE[name]
            )
            settings = RolloutConfig(engine="vllm", batch_size=batch, engine_options={"max_model_len": 128})
            engine = VllmEngine.load(spec, settings, device=torch.device("cpu"), policy_dtype=torch.float32)
        engine.tokenizer.eos_token_id = None
        torch.set_num_threads(options.threads)
        model.inverse_dynamics = None
        model.cast_modules()
        for mixed in (True, False):
            lengths = wanted_lengths(batch * 2, mixed, 6 if options.quick else 48)
            prompts = torch.randint(3, 150, (len(lengths) // GROUP, PROMPT), generator=torch.Generator().manual_seed(1))
            sides = {
                "ours": lambda m=model, p=prompts, n=lengths: ours(m, p, n, batch, GROUP),
                "vllm": lambda e=engine, p=prompts, n=lengths: by_vllm(e, p, n),
            }
            rates = alternate(sides, options.repeats)
            case = f"{name}, batch {batch}, {'mixed' if mixed else 'equal'}"
            raw[case] = rates
            line = {"case": case, "built-in, tokens/s": spread(rates["ours"]), "vLLM": spread(rates["vllm"])}
            lines.append(line | {"vLLM / built-in": spread(list(ratio(rates["vllm"], rates["ours"]).values()))})
            print(lines[-1], flush=True)
    report("vllm_decode", lines, {"measured": raw, "threads": options.threads}, options.out)


if __name__ == "__main__":
    main()
