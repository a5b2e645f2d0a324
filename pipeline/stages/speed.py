"""Seconds of each kind of work that a run is made of, measured here by doing a little of it: updates and evaluations of
the offline stages, rollouts, the update of the policy, with the config's own base LM, data, shapes and number types.

The added modules are new ones: what they compute differs from trained ones, what they cost does not.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from configs.schema import RunConfig
from latent_control.model import LatentActionLM
from latent_control.text import load_tokenizer
from learners.offline_training import make_optimizer, one_update
from pipeline.preflight.resources import cpus_here
from pipeline.runs.forecast import Speeds
from pipeline.runs.stage_table import BASE, IMPROVE_OFFLINE, planned
from pipeline.stages.base_model import resolve_base
from pipeline.stages.offline_job import OfflineJob
from pipeline.stages.offline_measures import measure_whole
from pipeline.stages.offline_work import accelerator_of, new_model, stage_on, streams
from rollout_workers.engines.local import LocalEngine
from rollout_workers.engines.protocol import DecodeJob
from rollout_workers.model_host import latent_host
from rollout_workers.tasks import AgentTask, build_task
from rollout_workers.tasks.encoding import encode_demonstration, encode_prompt

SECONDS = 0.7
"""For each kind of work; a slow machine takes longer for the least of it, one sequence."""
LOOKED_AT = 64
"""Demonstrations and batches by which lengths are judged."""


def measured_speeds(config: RunConfig) -> Speeds:
    """What a run of ``config``, whose types are decided, costs here per unit; a few seconds beside the loading.

    Raises:
        ValueError: the base LM cannot be loaded.
    """
    torch.set_num_threads(config.cluster.learner_threads)
    base = resolve_base(config)
    started = time.perf_counter()
    model = _model(config, base)
    load = time.perf_counter() - started
    tokenizer = load_tokenizer(base, trust_remote_code=config.base.trust_remote_code)
    updates: dict[str, float] = {}
    evaluations: dict[str, float] = {}
    for stage in planned(config):
        if stage.online or stage.name in (BASE, IMPROVE_OFFLINE):
            continue
        job = OfflineJob(
            stage=stage.name, config=config, settings=stage.settings(config), source=None, base=base, checkpoints=""
        )
        with suppress(ValueError, OSError):  # data that are made later, e.g. by latent-control sample
            updates[stage.name], evaluations[stage.name] = _offline(job, model, tokenizer)
    sample = Sample.of(config, tokenizer)
    learn = _learn(config, model, sample) if config.improve is not None else 0.0
    rollout, tokens = _rollout(config, model, tokenizer, sample)
    return Speeds(
        load=load,
        update=updates,
        evaluation=evaluations,
        rollout=rollout,
        tokens=tokens,
        learn=learn,
        cores=cpus_here(),
    )


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Prompts of the task as ids, and the tokens of a response by its demonstrations (``None``: there are none)."""

    prompts: tuple[tuple[int, ...], ...]
    response: float | None

    @classmethod
    def of(cls, config: RunConfig, tokenizer: Any) -> Sample:
        """Of the first training prompts of the config's task."""
        task, chat = build_task(config.task), config.task.chat
        if isinstance(task, AgentTask):
            raise ValueError(f"{config.task.name} is played in turns: how long its episodes take is not known before")
        found = task.prompts("train")
        prompts = [encode_prompt(tokenizer, found[i], chat=chat) for i in range(min(LOOKED_AT, len(found)))]
        lengths: list[int] = []
        with suppress(ValueError):
            for demo in islice(task.demonstrations("train"), LOOKED_AT):
                ids, start = encode_demonstration(tokenizer, demo, chat=chat)
                lengths.append(min(len(ids) - start, config.rollout.max_new_tokens))
        return cls(prompts=tuple(map(tuple, prompts)), response=statistics.mean(lengths) if lengths else None)


def _model(config: RunConfig, base: str) -> LatentActionLM:
    actions, trust = config.actions, config.base.trust_remote_code
    if actions is not None and actions.init is not None:
        return LatentActionLM.from_pretrained(actions.init, dtype=config.base.dtype, trust_remote_code=trust)
    if actions is not None:
        return new_model(actions, base, config, config.base.dtype)
    return LatentActionLM.from_base(base, dtype=config.base.dtype, trust_remote_code=trust)


def _timed(work: Callable[[int], Any], full: int) -> tuple[float, int]:
    """(median seconds of ``work(rows)``, rows): as many up to ``full`` as ``SECONDS`` allow, after one to warm up."""
    work(1)
    started = time.perf_counter()
    work(1)
    one = time.perf_counter() - started
    rows = max(1, min(full, int(SECONDS / max(one, 1e-6))))
    took = [one] if rows == 1 else []
    while not took or (sum(took) < SECONDS and len(took) < 5):
        started = time.perf_counter()
        work(rows)
        took.append(time.perf_counter() - started)
    return statistics.median(took), rows


def _offline(job: OfflineJob, model: LatentActionLM, tokenizer: Any) -> tuple[float, float]:
    """Seconds of an update and of an evaluation, whose sequences count by their padded tokens."""
    settings, accelerator = job.settings, accelerator_of(job.settings)
    stage = stage_on(model, job)
    optimizer = make_optimizer(stage, settings)
    few = settings.model_copy(update={"evaluation_sequences": min(32, settings.batch_size)})
    stream, heldout = streams(replace(job, settings=few), stage, accelerator, tokenizer, start=0)
    batches = list(islice(stream, 4))
    padded = statistics.mean(batch.input_ids.numel() for batch in batches)
    sizes: list[int] = []

    def update(rows: int) -> None:
        part = batches[len(sizes) % len(batches)].rows(0, rows)
        sizes.append(part.input_ids.numel())
        one_update(
            stage, stage, part, settings=settings, accelerator=accelerator, optimizer=optimizer, seed=0, update=0
        )

    seconds, rows = _timed(update, settings.batch_size)
    per_update = seconds * (1 if rows == settings.batch_size else padded / statistics.median(sizes[2:] or sizes))
    held = heldout[0]
    seconds, rows = _timed(lambda rows: measure_whole(job, model, [held.rows(0, rows)], -1), len(held.input_ids))
    return per_update, seconds * settings.evaluation_sequences / rows


def _learn(config: RunConfig, model: LatentActionLM, sample: Sample) -> float:
    """Seconds of forward and backward through the policy for all rollouts of an update, and of Adam's steps."""
    improve, policy = config.improve, model.policy
    assert improve is not None
    response = math.ceil(sample.response or config.rollout.max_new_tokens)
    length = round(statistics.mean(map(len, sample.prompts))) + response
    optimizer = torch.optim.Adam(policy.trainable(), lr=0.0)
    bf16 = improve.mixed_precision == "bf16"

    def step(rows: int) -> None:
        states = torch.zeros(rows, length, model.base.width, dtype=model.base.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = policy.head(policy.hidden(states)[:, -response:])
        logits.float().log_softmax(-1)[..., 0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in policy.trainable():
        parameter.requires_grad_(True)
    rollouts = improve.prompts_per_update * improve.group_size
    seconds, rows = _timed(step, min(rollouts, max(1, improve.microbatch_tokens // length)))
    return seconds * improve.epochs * rollouts / rows


def _rollout(config: RunConfig, model: LatentActionLM, tokenizer: Any, sample: Sample) -> tuple[float, float]:
    """(seconds of a rollout in one worker that is alone, its tokens); ``model`` is changed."""
    rollout, improve = config.rollout, config.improve
    torch.set_num_threads(rollout.torch_threads)
    bf16 = improve is not None and improve.mixed_precision == "bf16"
    engine = LocalEngine(latent_host(model, tokenizer, torch.bfloat16 if bf16 else torch.float32), rollout)
    repeats = improve.group_size if improve is not None else 1
    ships = improve is not None and config.ships_features

    def decode(prompts: int, most: int) -> int:
        """Rows of ``most`` tokens at most; returns the tokens that came."""
        chosen = tuple(sample.prompts[i % len(sample.prompts)] for i in range(prompts))
        job = DecodeJob(
            prompts=chosen,
            repeats=repeats,
            seeds=tuple(range(prompts * repeats)),
            max_new_tokens=most,
            keep_features=ships,
        )
        return int(engine.generate(job).lengths.sum())

    asked = math.ceil((improve.prompts_per_update if improve is not None else 64) / rollout.num_workers)
    most = rollout.max_new_tokens
    first, prompts = _timed(lambda prompts: decode(prompts, 1), asked)
    came: list[int] = []
    whole, prompts_too = _timed(lambda prompts: came.append(decode(prompts, most)), min(asked, prompts))
    rows, tokens = prompts_too * repeats, came[-1]
    first *= prompts_too / prompts
    each = (whole - first) / max(1, tokens - rows)
    expected = sample.response or tokens / rows
    return max(first / rows + (expected - 1) * each, 1e-6), expected
