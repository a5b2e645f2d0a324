"""``latent-control sample``: the base LM's own responses to the training prompts, as rows on which a codebook is
learned.

A few hundred rows with one answer each are learned by heart: the codes then know those answers and nothing else. What
the base LM itself answers to the same prompts shows all its choices, right and wrong, and leaves it to reinforcement
learning to distinguish them.

A row holds the texts and the token ids that were sampled (``rollout_workers.tasks.sampled_ids``). Responses that did
not end are left out, unless none ended: then all are kept, marked as truncated. Responses without text (the base ended
at once) are left out: a row needs an answer.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import ray

from configs.schema import RolloutConfig as RolloutSettings
from configs.schema import RunConfig
from latent_control.text import load_tokenizer
from pipeline.cluster.connect import connected
from pipeline.preflight.number_type import decided
from pipeline.rl.heldout import heldout_requests
from pipeline.stages.base_model import resolve_base
from pipeline.stages.play import players
from pipeline.storage.atomic import write_atomic
from rollout_workers.rollouts import HostSpec, Rollout
from rollout_workers.tasks import EpisodeTask, build_task
from rollout_workers.tasks.sampled_ids import COLUMN, SampledIds, fingerprint

PER_REQUEST = 256
MOST_PROMPTS = 100_000
"""Of tasks that generate theirs without end."""
NAMED, QUOTED = 3, 60
"""Prompts that a message quotes, and the characters of each, from its end."""


@dataclass(kw_only=True)
class Sampled:
    """Responses of the base LM to the training prompts, as rows; and what a user has to know about the others."""

    prompts: int
    rollout: RolloutSettings
    responses: int = 0
    solved: int = 0
    blank: int = 0
    """Without text, mostly ended at once."""
    ended: list[str] = field(default_factory=list)
    """A line of JSON each."""
    truncated: list[str] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    """Responses that the verifier could not judge, by the first message of each kind."""
    endless: dict[str, str] = field(default_factory=dict)
    """Text of each prompt, by its id, of which no response has ended with some text."""

    @property
    def rows(self) -> list[str]:
        """The lines to write."""
        return self.ended or self.truncated

    @property
    def failed(self) -> int:
        """Responses without a verdict."""
        return sum(self.failures.values())

    @property
    def success(self) -> float:
        """Share of the responses with a verdict; NaN where there is none."""
        judged = self.responses - self.failed
        return self.solved / judged if judged else math.nan

    @property
    def success_text(self) -> str:
        """``success`` in words."""
        return "not known" if math.isnan(self.success) else f"{self.success:.3f}"

    def add(self, rollouts: Sequence[Rollout], tokenizer: str) -> None:
        """Take in all responses to some prompts; ``tokenizer`` is the fingerprint of the one whose ids they have."""
        self.responses += len(rollouts)
        self.solved += sum(rollout.success for rollout in rollouts)
        known = {message.partition(":")[0]: message for message in self.failures}
        for failure in (rollout.failure for rollout in rollouts if rollout.failure is not None):
            self.failures[known.setdefault(failure.partition(":")[0], failure)] += 1
        self.endless |= {rollout.prompt_id: rollout.prompt_text for rollout in rollouts}
        for rollout in rollouts:
            if not rollout.text:
                self.blank += 1
                continue
            if not rollout.truncated:
                self.endless.pop(rollout.prompt_id, None)
            (self.truncated if rollout.truncated else self.ended).append(_line(rollout, tokenizer))

    def words(self) -> list[str]:
        """The responses that were not judged or are not rows, counted by reason."""
        every, setting = f"of {self.responses} responses", self.rollout
        said = [f"{count} {every} could not be judged: {why!r:.300}" for why, count in self.failures.most_common()]
        if self.blank:
            said.append(f"{self.blank} {every} have no text (the base LM ended at once): left out")
        if self.truncated:
            fate = "left out" if self.ended else "kept, marked as truncated: codes learn no end from them"
            said.append(
                f"{len(self.truncated)} {every} did not end within rollout.max_new_tokens={setting.max_new_tokens} "
                f"(temperature={setting.temperature:g}, stop={json.dumps(setting.stop)}): {fate}; raise it, set "
                "rollout.stop to what follows an answer, or show answers that end by task.shots"
            )
        if self.endless:
            quoted = ", ".join(f"{text[-QUOTED:]!r}" for text in list(self.endless.values())[:NAMED])
            more = ", ..." if len(self.endless) > NAMED else ""
            said.append(
                f"no response with text ended for {len(self.endless)} of {self.prompts} prompts: {quoted}{more}"
            )
        return said


def _line(rollout: Rollout, tokenizer: str) -> str:
    ids = SampledIds(
        tokenizer=tokenizer,
        prompt=tuple(rollout.prompt_tokens.tolist()),
        response=tuple(rollout.tokens.tolist()),
        truncated=rollout.truncated,
    )
    row = {"prompt": rollout.prompt_text, "answer": rollout.text, COLUMN: ids.column()}
    return json.dumps(row, ensure_ascii=False) + "\n"


def sample(
    config: RunConfig, out: Path, samples: int, say: Callable[[str], None], most_prompts: int | None = None
) -> Sampled:
    """Write ``samples`` responses to each training prompt, or the first ``most_prompts``, to ``out``: rows with prompt,
    answer and token ids.

    Raises:
        ValueError: no response has any text.
    """
    task = build_task(config.task)
    if isinstance(task, EpisodeTask):
        raise ValueError(
            f"task.name: {task.name} has several turns; sample takes tasks of one response: learn codes from its "
            "demonstrations or from the replay buffer of a run (data: [{kind: replay, path: RUN}])"
        )
    prompts = min(len(task.prompts("train")), most_prompts or MOST_PROMPTS)
    base = decided(config)[0].base
    host = HostSpec(
        level="base", checkpoint=resolve_base(config), dtype=base.dtype, trust_remote_code=base.trust_remote_code
    )
    tokenizer = fingerprint(load_tokenizer(host.checkpoint, trust_remote_code=base.trust_remote_code))
    found = Sampled(prompts=prompts, rollout=config.rollout)
    with connected(config), players(config) as pool:
        pieces = max(config.rollout.num_workers, prompts * samples // PER_REQUEST)
        asked = heldout_requests(
            config, prompts, pieces, samples=samples, temperature=config.rollout.temperature, host=host
        )
        requests = [replace(request, split="train") for request in asked]
        pool.submit(requests)
        for request in requests:
            (answer,) = pool.take([request.request_id])
            found.add(ray.get(answer.rollouts), tokenizer)
            say(f"sampled {found.responses}/{prompts * samples} responses, success {found.success_text}")
    if not found.rows:
        raise ValueError(
            f"none of {found.responses} responses has any text: the base LM ends at once; set task.chat for a chat "
            "model, or show answers by task.shots or task.options.template"
        )
    write_atomic(out, "".join(found.rows).encode())
    return found
