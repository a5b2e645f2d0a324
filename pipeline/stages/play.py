"""Evaluation: the same held-out prompts played by the base LM and by each stage's result, sampled and greedy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.rllib.env.env_runner_group import EnvRunnerGroup

from configs.schema import Evaluation, RunConfig
from latent_control.pretrained import CONFIG, base_path
from pipeline.cluster.connect import connected
from pipeline.evaluation.diversity import (
    at_equal_success,
    diversity,
    of_solutions,
    per_prompt_pairs,
    prompt_cosines,
    solutions,
)
from pipeline.evaluation.outcomes import Outcome, grouped, outcomes_of, success_matrix
from pipeline.evaluation.slices import field_problems, labels, sliced
from pipeline.evaluation.statistics import bootstrap_means, interval, paired_difference, pass_at_k, wilson
from pipeline.replay.writer import write_outcomes
from pipeline.rl.config import workers_config
from pipeline.rl.heldout import heldout_requests
from pipeline.rl.rollout_pool import RolloutPool, this_node
from pipeline.stages.base_model import resolve_base
from pipeline.stages.embedding import embed_texts
from pipeline.stages.improve import TOKEN_INFO, TOKEN_POLICY
from pipeline.stages.text_likelihood import measure_texts
from rollout_workers.model_host import WorkerSettings
from rollout_workers.rollouts import HostSpec, Rollout
from rollout_workers.tasks import Prompt, build_task

ROLLOUTS_PER_REQUEST = 64
Cosines = tuple[np.ndarray, np.ndarray]
"""Mean pairwise cosine per prompt [P] among all responses, and among the solutions."""


def variants(config: RunConfig, stages: Mapping[str, Path]) -> dict[str, HostSpec]:
    """What there is to evaluate, by name, given the finished stages' checkpoints."""
    common: dict[str, Any] = {"dtype": config.base.dtype, "trust_remote_code": config.base.trust_remote_code}
    found: dict[str, HostSpec] = {}
    for name, stage in (
        ("cloned", "clone"),
        ("finetuned", "finetune"),
        ("finetuned", "reclone"),
        ("offline", "improve_offline"),
        ("improved", "improve"),
        ("token_level", "token_level"),
    ):
        if stage in stages:
            found[name] = checkpoint_host(stages[stage], common)
    if "improved" in found and found["improved"].level == "token":
        found["token_level"] = found["improved"]
    return {"base": HostSpec(level="base", checkpoint=first_base(config, stages), **common), **found}


def first_base(config: RunConfig, stages: Mapping[str, Path]) -> str:
    """The base LM before any fine-tuning."""
    for stage in ("actions", "clone"):
        if stage in stages:
            return base_path(stages[stage])
    return resolve_base(config)


def checkpoint_host(folder: Path, common: dict[str, Any]) -> HostSpec:
    """How a worker hosts a checkpoint of either level.

    Raises:
        ValueError: it is neither.
    """
    if (folder / CONFIG).is_file():
        return HostSpec(level="latent", checkpoint=str(folder), **common)
    if (folder / TOKEN_INFO).is_file():
        info = json.loads((folder / TOKEN_INFO).read_text())
        return HostSpec(
            level="token",
            checkpoint=info["base"],
            token_trains=info["token_trains"],
            token_blocks=info["token_blocks"],
            policy_file=str(folder / TOKEN_POLICY),
            **common,
        )
    raise ValueError(f"{folder} is no checkpoint: it has neither {CONFIG} nor {TOKEN_INFO}")


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
        cloned": ...}}``; intervals are at 95 %: Wilson's for a success rate, paired bootstrap over prompts for a
        difference.

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
        write_outcomes(outcomes_file, [o for variant in played.values() for o in (*variant.sampled, *variant.greedy)])
    result: dict[str, Any] = {"prompts": prompts, "samples_per_prompt": settings.samples_per_prompt}
    for name, variant in played.items():
        result[name] = _numbers(variant, settings, config.seed, cosines.get(name), slices) | texts.get(name, {})
    result["differences"] = _differences(played, settings.samples_per_prompt, cosines, config.seed)
    return result | ({"notes": notes} if notes else {})


@dataclass(frozen=True, kw_only=True)
class Played:
    """What one variant did: every response, prompts outer, samples inner."""

    sampled: list[Outcome]
    greedy: list[Outcome]

    def successes(self, samples: int) -> dict[str, np.ndarray]:
        """Success of each prompt, [P], by mode; sampled: the mean over its samples."""
        return {
            "sampled": success_matrix(self.sampled, samples).mean(1),
            "greedy": success_matrix(self.greedy, 1)[:, 0],
        }


def slices_of(settings: Evaluation, heldout: Sequence[Prompt], prompts: int) -> dict[str, list[str]]:
    """The slice of each prompt that is played, by field of ``evaluation.slices``.

    Raises:
        ValueError: no prompt has such a field.
    """
    if not settings.slices:
        return {}
    metadata = [heldout[index].metadata for index in range(prompts)]
    if problems := field_problems(settings.slices, metadata):
        raise ValueError("; ".join(problems))
    return {field: labels(field, metadata) for field in settings.slices}


# -- playing -----------------------------------------------------------------------------------------------------------


def _play_all(
    config: RunConfig, settings: Evaluation, hosts: Mapping[str, HostSpec], prompts: int, say: Callable[[str], None]
) -> dict[str, Played]:
    """Both passes of every variant, on workers of their own."""
    played: dict[str, Played] = {}
    with players(config) as pool:
        for name, host in hosts.items():
            sampled = _play(pool, config, host, prompts, settings.samples_per_prompt, config.rollout.temperature)
            greedy = _play(pool, config, host, prompts, 1, 0.0)
            played[name] = Played(
                sampled=outcomes_of(name, "sampled", sampled, settings.samples_per_prompt),
                greedy=outcomes_of(name, "greedy", greedy, 1),
            )
            rates = {
                mode: values.mean() for mode, values in played[name].successes(settings.samples_per_prompt).items()
            }
            say(f"{name}: sampled {rates['sampled']:.3f}, greedy {rates['greedy']:.3f}")
    return played


@contextmanager
def players(config: RunConfig) -> Iterator[RolloutPool]:
    """Rollout workers without a policy of their own: each request names what it is played by. Ray must be connected."""
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
    pool: RolloutPool, config: RunConfig, host: HostSpec, prompts: int, samples: int, temperature: float
) -> list[Rollout]:
    """One pass over the first held-out prompts: ``samples`` rollouts of each, in order."""
    pieces = max(config.rollout.num_workers, math.ceil(prompts * samples / ROLLOUTS_PER_REQUEST))
    requests = heldout_requests(config, prompts, pieces, samples=samples, temperature=temperature, host=host)
    pool.submit(requests)
    return [rollout for answer in pool.take(r.request_id for r in requests) for rollout in ray.get(answer.rollouts)]


# -- what the numbers are ----------------------------------------------------------------------------------------------


def _numbers(
    played: Played, settings: Evaluation, seed: int, cosines: Cosines | None, slices: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """The row of one variant."""
    samples, outcomes = settings.samples_per_prompt, played.successes(settings.samples_per_prompt)
    numbers: dict[str, Any] = {}
    for mode, rows in (("sampled", played.sampled), ("greedy", played.greedy)):
        rate = outcomes[mode]
        one_each = len(rows) == len(rate)
        numbers[mode] = float(rate.mean())
        # Several samples of one prompt are not independent: then it is prompts that are resampled.
        numbers[f"{mode}_interval"] = (
            wilson(float(rate.sum()), len(rate)) if one_each else interval(bootstrap_means(rate, seed))
        )
        numbers[f"{mode}_tokens"] = sum(o.new_tokens for o in rows) / len(rows)
        numbers[f"{mode}_failures"] = sum(o.reward is None for o in rows)
    solved = success_matrix(played.sampled, samples).sum(1)
    for k in settings.pass_at:
        chances = pass_at_k(solved, samples, k)
        numbers |= {
            f"pass_at_{k}": float(chances.mean()),
            f"pass_at_{k}_interval": interval(bootstrap_means(chances, seed)),
        }
    return (
        numbers
        | _variety(played, samples, seed, cosines)
        | (sliced(outcomes, slices, settings.slice_minimum, seed) if slices else {})
    )


def _variety(played: Played, samples: int, seed: int, cosines: Cosines | None) -> dict[str, Any]:
    """Diversity of all responses and of the solutions; nothing when there is one response per prompt."""
    if samples < 2:
        return {}
    among_all, among_solved = (None, None) if cosines is None else cosines
    solved = _solved(played, samples)
    return diversity(grouped(played.sampled, samples), seed, among_all) | of_solutions(solved, seed, among_solved)


def _solved(played: Played, samples: int) -> list[list[str]]:
    """Per prompt, the responses that solve it."""
    return solutions(grouped(played.sampled, samples), success_matrix(played.sampled, samples).astype(bool).tolist())


def _cosines(config: RunConfig, played: Mapping[str, Played], samples: int) -> dict[str, Cosines]:
    """Mean pairwise cosine per prompt by variant: among all its responses, and among its solutions. Each text is
    embedded once."""
    texts = sorted({outcome.response for variant in played.values() for outcome in variant.sampled})
    vectors = dict(zip(texts, embed_texts(config, texts), strict=True))

    def embed(some: Sequence[str]) -> np.ndarray:
        return np.stack([vectors[text] for text in some])

    return {
        name: (prompt_cosines(grouped(v.sampled, samples), embed), prompt_cosines(_solved(v, samples), embed))
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


def _differences(
    played: Mapping[str, Played], samples: int, cosines: Mapping[str, Cosines], seed: int
) -> dict[str, Any]:
    """Improved against each of the others, and what came of the replay buffer against what was before it: success
    sampled and greedy, and diversity at equal success."""
    pairs = [("improved", other) for other in played if other != "improved"]
    pairs += [("offline", other) for other in played if other not in ("offline", "improved", "token_level")]
    successes = {name: variant.successes(samples) for name, variant in played.items()}
    varied = {name: _varied(variant, samples, cosines.get(name)) for name, variant in played.items()}
    differences = {}
    for better, worse in (pair for pair in pairs if pair[0] in played):
        passes = {
            mode: paired_difference(rates, successes[worse][mode], seed) for mode, rates in successes[better].items()
        }
        equal = at_equal_success(varied[better], varied[worse], seed) if samples > 1 else {}
        differences[f"{better} - {worse}"] = passes | equal
    return differences


def _varied(played: Played, samples: int, cosines: Cosines | None) -> dict[str, np.ndarray]:
    """Per-prompt diversity of the solutions, [P], NaN where there are fewer than two."""
    pairs = {"differing_pairs_successful": per_prompt_pairs(_solved(played, samples))}
    return pairs if cosines is None else pairs | {"pairwise_cosine_successful": cosines[1]}
