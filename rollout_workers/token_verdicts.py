"""The verifier's verdict on generated tokens, as in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from configs.schema import RunConfig
from latent_control.decoding.stop_strings import ended
from rollout_workers.tasks.encoding import decode_response
from rollout_workers.tasks.protocol import Failure, Prompt, Score, Task
from rollout_workers.tasks.rewards import Response, judge


def judged_tokens(
    task: Task, config: RunConfig, tokenizer: Any, prompt: Prompt, tokens: Sequence[int]
) -> Score | Failure:
    """Decoded, judged and weighed as ``config`` says."""
    stop = config.rollout.stop
    response = Response(
        text=decode_response(tokenizer, tokens, stop),
        new_tokens=len(tokens),
        limit=config.rollout.max_new_tokens,
        stopped=ended(tokenizer, stop, tokens),
    )
    return judge(task, config.reward, prompt, response)
