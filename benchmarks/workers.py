"""Tokens/s of one and of two rollout workers.

    python benchmarks/workers.py [--repeats 5] [--quick] [--out DIR]

Real ``LMEnvRunner`` actors with one thread each on the 0.9 M-parameter base LM, 128 rollouts of 48 tokens per request,
8 requests per worker and round; no learner, and the driver only waits. The bar of 1.8 x needs two free cores.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from common import alternate, arguments, ratio, report, spread
from models import endless
from ray.rllib.env.env_runner_group import EnvRunnerGroup

from configs.schema import RunConfig
from latent_control.pretrained import base_path
from pipeline.cluster.connect import connected
from pipeline.rl.config import workers_config
from pipeline.rl.rollout_pool import RolloutPool
from rollout_workers.model_host import WorkerSettings
from rollout_workers.rollouts import HostSpec, RolloutRequest

GROUP, TOKENS = 8, 48


def rate(pool: RolloutPool, host: HostSpec, *, requests: int, prompts: int) -> float:
    """Tokens/s over ``requests`` requests of ``prompts`` groups each."""
    asked = [
        RolloutRequest(
            request_id=i,
            split="train",
            prompt_indices=tuple(range(prompts)),
            seeds=(i,) * prompts,
            group_size=GROUP,
            host=host,
        )
        for i in range(requests)
    ]
    started = time.perf_counter()
    pool.submit(asked)
    tokens = sum(answer.summary.tokens for answer in pool.take(range(requests)))
    seconds = time.perf_counter() - started
    assert tokens == requests * prompts * GROUP * TOKENS, "every response has full length"
    return tokens / seconds


def measure(checkpoint: Path, *, requests: int, prompts: int, repeats: int) -> dict[str, list[float]]:
    """Tokens/s by the number of workers, "1" and "2"."""
    config = RunConfig(base={"model": base_path(checkpoint)}, rollout={"num_workers": 3, "max_new_tokens": TOKENS})
    host = HostSpec(level="latent", checkpoint=str(checkpoint))
    settings = WorkerSettings(host=None, policy_dtype="float32", task=config.task, rollout=config.rollout)
    with connected(config):
        sides = {}
        for workers in (1, 2):
            rllib = workers_config(config, settings).env_runners(num_env_runners=workers)
            pool = RolloutPool(EnvRunnerGroup(config=rllib, local_env_runner=False), timeout=120)
            sides[str(workers)] = lambda pool=pool, n=workers: rate(pool, host, requests=n * requests, prompts=prompts)
        return alternate(sides, repeats)


def main() -> None:
    """Command line."""
    options = arguments(__doc__).parse_args()
    requests, prompts = (2, 2) if options.quick else (8, 16)
    with tempfile.TemporaryDirectory() as work:
        rates = measure(endless(Path(work)), requests=requests, prompts=prompts, repeats=options.repeats)
    rows = [
        {"workers": n, "tokens/s": spread(values), "against 1": spread(list(ratio(values, rates["1"]).values()))}
        for n, values in rates.items()
    ]
    report("workers", rows, {"tokens_per_second": rates}, options.out)


if __name__ == "__main__":
    main()
