"""Evaluates the base LM and each stage's result on the same held-out prompts, sampled and greedy; a latent
policy greedily by code and by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.rllib.env.env_runner_group import EnvRunnerGroup

from configs.gates import OF_POLICY
from configs.schema import Decode, Evaluation, RunConfig
from latent_control.analysis.measures import usage_measures
from latent_control.decoding.rescoring import choices
from latent_control.pretrained import base_path, read_shape
from pipeline.cluster.connect import connected
from pipeline.evaluation.diversity import (
    prompt_cosines,
)
from pipeline.evaluation.modes import MODES
from pipeline.evaluation.outcome_file import write_outcomes
from pipeline.evaluation.outcomes import grouped, outcomes_of
from pipeline.evaluation.results import Cosines, Played, differences, slices_of, solved_responses, variant_numbers
from pipeline.rl.config import workers_config
from pipeline.rl.heldout import heldout_requests
from pipeline.rl.rollout_pool import RolloutPool, this_node
from pipeline.runs.stage_table import ACTIONS, CLONE, MAKERS, TOKEN_LEVEL
from pipeline.stages.base_model import resolve_base
from pipeline.stages.embedding import embed_texts
from pipeline.stages.text_likelihood import measure_texts
from pipeline.stages.token_checkpoint import checkpoint_host
from rollout_workers.model_host import WorkerSettings
from rollout_workers.rollouts import HostSpec, Rollout
from rollout_workers.tasks import build_task

ROLLOUTS_PER_REQUEST = 64


def variants(config: RunConfig, stages: Mapping[str, Path]) -> dict[str, HostSpec]:
    """What there is to evaluate, by name, given the finished stages' checkpoints."""
    common: dict[str, Any] = {"dtype": config.base.dtype, "trust_remote_code": config.base.trust_remote_code}
    found: dict[str, HostSpec] = {}
    for name, stage in ((name, stage) for name, made in MAKERS.items() for stage in made if stage in stages):
        found[name] = checkpoint_host(stages[stage], common)
    if "improved" in found and found["improved"].level == "token":
        found[TOKEN_LEVEL] = found["improved"]
    return {"base": HostSpec(level="base", checkpoint=first_base(config, stages), **common), **found}


def first_base(config: RunConfig, stages: Mapping[str, Path]) -> str:
    """The base LM before any fine-tuning."""
    for stage in (ACTIONS, CLONE):
        if stage in stages:
            return base_path(stages[stage])
    return resolve_base(config)


def evaluate(
    config: RunConfig,
    hosts: Mapping[str, HostSpec],
    *,
    prompts: int,
    say: Callable[[str], None],
    outcomes_file: Path | None = None,
) -> dict[str, Any]:
    """Every variant on the same held-out prompts and texts (docs/evaluation.md says what each number is).

    Args:
        outcomes_file: where every judged response is stored (Parquet); ``None``: nowhere.

    Returns: ``{"prompts": n, "<variant>": {"sampled", "greedy", "sampled_interval", ...}, "differences": {"improved -
        cloned": ...}}``; intervals are at 95 %, over prompts (``pipeline.evaluation.statistics``).

    Raises:
        ValueError: the engine only simulates decoding, or ``evaluation.slices`` names a field that no prompt has.
    """
    if config.rollout.engine == "simulated":
        raise ValueError(
            "rollout.engine is simulated: its rollouts are noise, there is nothing to evaluate; set "
            "rollout.engine: local"
        )
    settings = config.evaluation or Evaluation()
    heldout = build_task(config.task).prompts("heldout")
    prompts = min(prompts, len(heldout))
    slices = slices_of(settings, heldout, prompts)
    with connected(config):
        played = _play_all(config, settings, hosts, prompts, say)
        cosines = {} if settings.embedder is None else _cosines(config, played, settings.samples_per_prompt)
        texts, notes = _texts(config, hosts)
    for note in notes:
        say(note)
    if outcomes_file is not None:
        write_outcomes(
            outcomes_file, [o for variant in played.values() for rows in variant.passes.values() for o in rows]
        )
    result: dict[str, Any] = {"prompts": prompts, "samples_per_prompt": settings.samples_per_prompt}
    result["mixture_codes"] = config.decoding.mixture_codes
    for name, variant in played.items():
        result[name] = variant_numbers(variant, settings, config.seed, cosines.get(name), slices) | texts.get(name, {})
    result["differences"] = differences(played, settings.samples_per_prompt, cosines, config.seed)
    return result | ({"notes": notes} if notes else {})


# -- playing -----------------------------------------------------------------------------------------------------------


def _play_all(
    config: RunConfig, settings: Evaluation, hosts: Mapping[str, HostSpec], prompts: int, say: Callable[[str], None]
) -> dict[str, Played]:
    """All passes of every variant, on separate workers."""
    played, samples = dict[str, Played](), settings.samples_per_prompt
    with players(config) as pool:
        for name, host in hosts.items():
            play = partial(_play, pool, config, host, prompts)
            played[name] = _passes(name, host, samples, config.rollout.temperature, play)
            rates = played[name].successes(samples).items()
            said = (f"{MODES[mode]} {values.mean():.3f}" for mode, values in rates)
            say(f"{name}: {', '.join(said)}")
    return played


def _passes(name: str, host: HostSpec, samples: int, temperature: float, play: Callable[..., Any]) -> Played:
    """Of one variant: sampled, greedy, and greedy by token."""
    sampled, _ = play(samples, temperature)
    greedy, seconds = play(1, 0.0)
    by_token, token_seconds = play(1, 0.0, "token") if host.level == "latent" else (None, 0.0)
    return Played(
        sampled=outcomes_of(name, "sampled", sampled, samples),
        greedy=outcomes_of(name, "greedy", greedy, 1),
        greedy_token=None if by_token is None else outcomes_of(name, "greedy_token", by_token, 1),
        token_cost=token_seconds / seconds if token_seconds else None,
        usage=_usage(host, sampled),
    )


def _usage(host: HostSpec, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Health of the codebook by the codes that the policy chose."""
    if host.level != "latent":
        return {}
    shape = read_shape(Path(host.checkpoint))
    chosen = np.concatenate([r.actions[choices(r.generated, len(r), shape.span)] for r in rollouts])
    found = usage_measures(torch.from_numpy(np.bincount(chosen, minlength=shape.num_actions) / len(chosen)), "policy")
    return {name: found[name] for name in OF_POLICY}


@contextmanager
def players(config: RunConfig) -> Iterator[RolloutPool]:
    """Rollout workers without a fixed policy: each request names its host. Ray must be connected."""
    dtype = "bfloat16" if config.improve is not None and config.improve.mixed_precision == "bf16" else "float32"
    # Whatever engine trains, one and the same judges.
    rollout = config.rollout.model_copy(update={"engine": "local", "engine_options": {}})
    workers = WorkerSettings(host=None, policy_dtype=dtype, task=config.task, rollout=rollout, reward=config.reward)
    group = EnvRunnerGroup(config=workers_config(config, workers), local_env_runner=False)
    try:
        yield RolloutPool(group, timeout=config.cluster.worker_timeout_seconds, node=this_node())
    finally:
        group.stop()


def _play(
    pool: RolloutPool,
    config: RunConfig,
    host: HostSpec,
    prompts: int,
    samples: int,
    temperature: float,
    decode: Decode = "code",
) -> tuple[list[Rollout], float]:
    """One pass over the first held-out prompts: ``samples`` rollouts of each, in order, and the workers' seconds per
    token."""
    pieces = max(config.rollout.num_workers, math.ceil(prompts * samples / ROLLOUTS_PER_REQUEST))
    requests = heldout_requests(
        config, prompts, pieces, samples=samples, temperature=temperature, decode=decode, host=host
    )
    pool.submit(requests)
    finished = pool.take(r.request_id for r in requests)
    seconds, tokens = (sum(getattr(f.summary, name) for f in finished) for name in ("seconds", "tokens"))
    return [rollout for one in finished for rollout in ray.get(one.rollouts)], seconds / max(1, tokens)


def _cosines(config: RunConfig, played: Mapping[str, Played], samples: int) -> dict[str, Cosines]:
    """Mean pairwise cosine per prompt by variant: among all its responses, and among its solutions. Each text is
    embedded once."""
    texts = sorted({outcome.response for variant in played.values() for outcome in variant.sampled})
    vectors = dict(zip(texts, embed_texts(config, texts), strict=True))

    def embed(some: Sequence[str]) -> np.ndarray:
        return np.stack([vectors[text] for text in some])

    return {
        name: (prompt_cosines(grouped(v.sampled, samples), embed), prompt_cosines(solved_responses(v, samples), embed))
        for name, v in played.items()
    }


def _texts(config: RunConfig, hosts: Mapping[str, HostSpec]) -> tuple[dict[str, dict[str, float]], list[str]]:
    """The measures on text, or a note why there are none: a task need not have demonstrations."""
    try:
        return measure_texts(config, hosts), []
    except ValueError as error:
        if config.evaluation is not None and config.evaluation.retention is not None:
            raise
        return {}, [f"NLL, retention and codebook health were not measured: {getattr(error, 'cause', None) or error}"]
