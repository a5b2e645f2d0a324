"""``latent-control sample``: the base LM's own responses to the training prompts, as rows on which a codebook is
learned.

A few hundred rows with one answer each are learned by heart: the codes then know those answers and nothing else. What
the base LM itself answers to the same prompts shows all its choices, right and wrong, and leaves it to reinforcement
learning to distinguish them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ray

from configs.schema import RunConfig
from pipeline.cluster.connect import connected
from pipeline.rl.heldout import heldout_requests
from pipeline.stages.base_model import resolve_base
from pipeline.stages.play import players
from pipeline.storage.atomic import write_atomic
from rollout_workers.rollouts import HostSpec
from rollout_workers.tasks import build_task

PER_REQUEST = 256
STOP = "stop"


def sample(config: RunConfig, out: Path, samples: int, say: Callable[[str], None]) -> dict[str, float]:
    """Write ``samples`` responses to each training prompt to ``out``, rows ``{"prompt", "answer"}``; those that did not
    end are left out.

    Raises:
        ValueError: nothing ended within ``rollout.max_new_tokens``.
    """
    prompts = build_task(config.task).prompts("train")
    host = HostSpec(
        level="base",
        checkpoint=resolve_base(config),
        dtype=config.base.dtype,
        trust_remote_code=config.base.trust_remote_code,
    )
    lines: list[str] = []
    played = solved = 0
    with connected(config), players(config) as pool:
        pieces = max(config.rollout.num_workers, len(prompts) * samples // PER_REQUEST)
        asked = heldout_requests(
            config, len(prompts), pieces, samples=samples, temperature=config.rollout.temperature, host=host
        )
        requests = [replace(request, split="train") for request in asked]
        pool.submit(requests)
        for request in requests:
            (answer,) = pool.take([request.request_id])
            rollouts = ray.get(answer.rollouts)
            played += len(rollouts)
            solved += sum(rollout.success for rollout in rollouts)
            ended = [r for r in rollouts if r.finish_reason == STOP]
            lines += [json.dumps({"prompt": r.prompt_text, "answer": r.text}, ensure_ascii=False) + "\n" for r in ended]
            say(f"sampled {played}/{len(prompts) * samples} responses, success {solved / played:.3f}")
    if not lines:
        raise ValueError(
            f"none of {played} responses ended within rollout.max_new_tokens={config.rollout.max_new_tokens}; raise it"
        )
    write_atomic(out, "".join(lines).encode())
    return {"prompts": len(prompts), "responses": played, "rows": len(lines), "success": solved / played}
