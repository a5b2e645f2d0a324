"""Seconds of each kind of work that a run is made of, measured here by doing a little of it: updates and evaluations of
the offline stages, rollouts, the update of the policy, with the config's own base LM, data, shapes and number types.

The added modules are new ones: what they compute differs from trained ones, what they cost does not.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch

from configs.schema import Actions, Clone, Finetune, RunConfig
from latent_control.model import LatentActionLM
from latent_control.text import load_tokenizer
from learners.offline_training import make_optimizer, one_update
from pipeline.preflight.resources import cpus_here
from pipeline.runs.forecast import Speeds
from pipeline.runs.stage_table import BASE, IMPROVE_OFFLINE, Stage, planned
from pipeline.stages.base_model import resolve_base
from pipeline.stages.offline_job import OfflineJob, passes_on
from pipeline.stages.offline_measures import final_measures, marginal_rows, measure_whole
from pipeline.stages.offline_work import accelerator_of, new_model, stage_on, streams
from pipeline.stages.play import ROLLOUTS_PER_REQUEST
from rollout_workers.engines.local import LocalEngine
from rollout_workers.engines.protocol import DecodeJob
from rollout_workers.model_host import latent_host
from rollout_workers.tasks import EpisodeTask, build_task
from rollout_workers.tasks.encoding import encode_demonstration, encode_prompt

SECONDS, LONGEST = 0.4, 4.0
"""For each kind of work; a slow machine takes longer for the least of it, two sizes, the second of which is left out
only where the first took the latter time."""
WAITING = 1.2
"""Wall seconds per second of this thread in which it waits for its own helpers; beyond, other processes had the cores
(15 of them made an update of 0.1 s take 4)."""
LOOKED_AT, FEW = 64, 8
"""Demonstrations by which lengths are judged; rollouts that are played where there are none."""


Work = Callable[[int], int]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Prompts of the task as ids, and the tokens of a response by its demonstrations (``None``: there are none)."""

    prompts: tuple[tuple[int, ...], ...]
    response: float | None

    @classmethod
    def of(cls, config: RunConfig, tokenizer: Any) -> Sample:
        """The first training prompts of the config's task; ``ValueError`` for one that is played in turns."""
        task, chat = build_task(config.task), config.task.chat
        if isinstance(task, EpisodeTask):
            raise ValueError(
                f"{config.task.name} has several turns, and the length of its episodes is not known before"
            )
        found = task.prompts("train")
        prompts = [encode_prompt(tokenizer, found[i], chat=chat) for i in range(min(LOOKED_AT, len(found)))]
        lengths: list[int] = []
        with suppress(ValueError):  # not every task has them
            for demo in islice(task.demonstrations("train"), LOOKED_AT):
                ids, start = encode_demonstration(tokenizer, demo, chat=chat)
                lengths.append(min(len(ids) - start, config.rollout.max_new_tokens))
        return cls(prompts=tuple(map(tuple, prompts)), response=statistics.mean(lengths) if lengths else None)


class Rehearsal:
    """The work of a run of ``config``, whose types are decided, in this process.

    Raises:
        ValueError: the base LM cannot be loaded, or the task is played in turns.
    """

    def __init__(self, config: RunConfig) -> None:
        torch.set_num_threads(config.cluster.learner_threads)
        self.config, self.base = config, resolve_base(config)
        self.tokenizer = load_tokenizer(self.base, trust_remote_code=config.base.trust_remote_code)
        self.sample = Sample.of(config, self.tokenizer)
        self.load = math.inf
        for _ in range(2):  # the first time, code is loaded too
            if self.load > SECONDS:
                started = time.thread_time()
                self.model = _model(config, self.base)
                self.load = min(self.load, time.thread_time() - started)
        self.dtype = self.model.base.dtype

    def offline(self, stage: Stage, *, kept: bool = False) -> tuple[Work, Work, Work, float]:
        """(an update of so many sequences, which returns their padded tokens; an evaluation on so many; what is
        measured on them at the end alone; the padded tokens of a whole batch). Where ``kept``, all updates are on one
        batch, whose states cloning reads once.

        Raises:
            ValueError: the stage's data cannot be read.
        """
        settings = stage.settings(self.config)
        if isinstance(settings, Clone) and not kept:
            settings = settings.model_copy(update={"passes": 1})
        few = settings.model_copy(update={"evaluation_sequences": min(32, settings.batch_size)})
        job = OfflineJob(
            stage=stage.name, config=self.config, settings=few, source=None, base=self.base, checkpoints=""
        )
        trained, accelerator = stage_on(self.model, job), accelerator_of(settings)
        stream, held = streams(job, trained, accelerator, self.tokenizer, start=0)
        batches = list(islice(stream, 4))
        turn = cycle(batches[:1]) if kept else stream  # to make a batch takes time, too
        self.model.base.lm.to(torch.float32 if isinstance(settings, Finetune) else self.dtype)  # as build_stage
        common = {"settings": settings, "accelerator": accelerator, "optimizer": make_optimizer(trained, settings)}

        def update(rows: int) -> int:
            part = next(turn).rows(0, rows)
            one_update(trained, trained, part, **common, seed=0, update=0)
            return part.input_ids.numel()

        def evaluate(rows: int) -> int:
            measure_whole(job, self.model, [held[0].rows(0, rows)], -1)
            return rows

        def finish(rows: int) -> int:
            final_measures(job, self.model, [held[0].rows(0, rows)])
            return rows

        return update, evaluate, finish, statistics.mean(batch.input_ids.numel() for batch in batches)

    def learning(self) -> Callable[[int], int]:
        """Forward and backward through the policy for so many rollouts, and a step of Adam."""
        improve, policy = self.config.improve, self.model.policy.float()
        assert improve is not None
        response = math.ceil(self.sample.response or self.config.rollout.max_new_tokens)
        length = round(statistics.mean(map(len, self.sample.prompts))) + response
        self.model.requires_grad_(False)
        for parameter in policy.trainable():
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(policy.trainable(), lr=1e-8)
        most = max(1, improve.microbatch_tokens // length)

        def step(rows: int) -> int:
            for first in range(0, rows, most):
                states = torch.zeros(min(most, rows - first), length, self.model.base.width, dtype=self.dtype)
                with torch.autocast("cpu", torch.bfloat16, enabled=improve.mixed_precision == "bf16"):
                    logits = policy.head(policy.hidden(states)[:, -response:])
                logits.float().log_softmax(-1)[..., 0].mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            return rows

        return step

    def decoding(self) -> Callable[[int, int], torch.Tensor]:
        """Rollouts of so many prompts with so many tokens at most, as one worker; returns their lengths. The model is
        for sampling from then on."""
        rollout, improve = self.config.rollout, self.config.improve
        torch.set_num_threads(rollout.torch_threads)
        self.model.base.lm.to(self.dtype)
        dtype = torch.bfloat16 if improve is not None and improve.mixed_precision == "bf16" else torch.float32
        engine = LocalEngine(latent_host(self.model, self.tokenizer, dtype), rollout)

        def decode(prompts: int, most: int) -> torch.Tensor:
            job = DecodeJob(
                prompts=tuple(islice(cycle(self.sample.prompts), prompts)),
                repeats=self.group,
                seeds=tuple(range(prompts * self.group)),
                max_new_tokens=most,
                keep_features=improve is not None and self.config.ships_features,
            )
            return engine.generate(job).lengths.float()

        return decode

    @property
    def group(self) -> int:
        """Rollouts of a prompt."""
        return self.config.improve.group_size if self.config.improve is not None else 1


def _model(config: RunConfig, base: str) -> LatentActionLM:
    actions, trust = config.actions, config.base.trust_remote_code
    if actions is not None and actions.init is not None:
        return LatentActionLM.from_pretrained(actions.init, dtype=config.base.dtype, trust_remote_code=trust)
    if actions is not None:
        return new_model(actions, base, config, config.base.dtype)
    return LatentActionLM.from_base(base, dtype=config.base.dtype, trust_remote_code=trust)


class Stopwatch:
    """Times work as it would take alone: of the waiting for other processes it is told what it was."""

    def __init__(self) -> None:
        self.wall, self.own = 0.0, 0.0

    def once(self, work: Callable[[int], float], rows: int) -> tuple[float, float]:
        """(size of the work on ``rows``, seconds)"""
        wall, own = time.perf_counter(), time.thread_time()
        size = work(rows)
        wall, own = time.perf_counter() - wall, time.thread_time() - own
        seconds = wall if torch.cuda.is_available() else min(wall, WAITING * own)
        self.wall, self.own = self.wall + wall, self.own + seconds
        return size, seconds

    def __call__(self, work: Callable[[int], float], rows: int, whole: float) -> float:
        """Seconds of work of size ``whole``, which is that of about ``rows`` rows; ``work(n)`` does ``n`` of them and
        returns its size. Tried on ever more rows while that is quick, after one to warm up."""
        work(1)
        number, points = 1, [self.once(work, 1)]
        # One size alone tells nothing of what is fixed: 16 rows of SmolLM2 cost not half of 16 times one row.
        while number < rows and points[-1][1] < (LONGEST if len(points) == 1 else SECONDS / 2):
            number = min(rows, 4 * number)
            points.append(self.once(work, number))
        while number == rows and sum(seconds for _, seconds in points) < SECONDS:
            points.append(self.once(work, number))
        return extrapolated(points, whole)


def extrapolated(points: Sequence[tuple[float, float]], size: float) -> float:
    """Seconds at ``size``, on the line through the last of the ``points`` (size, seconds) and the nearest one that is
    at most half as large: what is fixed is not multiplied."""
    largest = max(x for x, _ in points)
    at_largest = statistics.median(t for x, t in points if x > 0.9 * largest)
    below = [(x, t) for x, t in points if x <= largest / 2]
    if not below:
        return at_largest * size / largest
    x, t = below[-1]
    return at_largest + max(0.0, at_largest - t) / (largest - x) * (size - largest)


def measured_speeds(config: RunConfig) -> Speeds:
    """What a run of ``config``, whose types are decided, costs here per unit; a few seconds beside the loading.

    Raises:
        ValueError: as ``Rehearsal``.
    """
    work, timed = Rehearsal(config), Stopwatch()
    updates: dict[str, float] = {}
    evaluations: dict[str, float] = {}
    final: dict[str, float] = {}
    for stage in planned(config):
        if not (stage.online or stage.name in (BASE, IMPROVE_OFFLINE) or passes_on(stage.settings(config))):
            with suppress(ValueError, OSError):  # data that are made later, e.g. by latent-control sample
                updates[stage.name], evaluations[stage.name], final[stage.name] = _offline(work, stage, timed)
    learn = 0.0
    if (improve := config.improve) is not None:
        rollouts = improve.prompts_per_update * improve.group_size
        learn = improve.epochs * timed(work.learning(), rollouts, rollouts)
    rollout, tokens = _rollout(work, timed)
    return Speeds(
        load=work.load,
        update=updates,
        evaluation=evaluations,
        final=final,
        rollout=rollout,
        tokens=tokens,
        learn=learn,
        cores=cpus_here(),
        busy=timed.wall / timed.own,
    )


def _offline(work: Rehearsal, stage: Stage, timed: Stopwatch) -> tuple[float, float, float]:
    """Seconds of an update, whose sequences count by their padded tokens, of an evaluation, and of what is measured at
    the end alone."""
    settings = stage.settings(work.config)
    update, evaluate, finish, whole = work.offline(stage)
    per_update = timed(update, settings.batch_size, whole)
    if isinstance(settings, Clone) and settings.passes > 1:
        again, *_ = work.offline(stage, kept=True)
        again(settings.batch_size)
        later = statistics.median(timed.once(again, settings.batch_size)[1] for _ in range(3))
        per_update = later + (per_update - later) / settings.passes
    rows, sequences = min(32, settings.batch_size, settings.evaluation_sequences), settings.evaluation_sequences
    at_end = sequences if isinstance(settings, Actions) else marginal_rows(work.config, settings)
    each = timed(finish, rows, rows) / rows if at_end else 0.0
    return per_update, timed(evaluate, rows, rows) * sequences / rows, each * at_end


def _rollout(work: Rehearsal, timed: Stopwatch) -> tuple[float, float]:
    """(seconds of a rollout in one worker that is alone, its tokens). As many rows are decoded at once as in a run: a
    step's cost is that of the weights, however many rows they are read for."""
    rollout, improve, decode = work.config.rollout, work.config.improve, work.decoding()
    prompts = improve.prompts_per_update if improve is not None else ROLLOUTS_PER_REQUEST
    prompts = max(1, min(math.ceil(prompts / rollout.num_workers), rollout.batch_size // work.group))
    tokens, tail = work.sample.response, 0.0
    if tokens is None:
        lengths, few = torch.zeros(1), max(1, min(prompts, FEW // work.group))

        def play(count: int) -> float:
            nonlocal lengths
            lengths = decode(count, rollout.max_new_tokens)
            return float(lengths.max())

        longest, seconds = timed.once(play, few)
        tokens = float(lengths.mean())
        tail = (longest - tokens) * seconds / longest  # at last only the longest rows are there
    rows = prompts * work.group
    together = timed(lambda most: float(decode(prompts, most).mean()), math.ceil(tokens), tokens)
    return (together + tail) / rows, tokens
