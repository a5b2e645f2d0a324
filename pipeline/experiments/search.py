"""``search``: greedy, sampled, best-of-n and tree search on the same held-out prompts, at equal numbers of generated
tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from configs.loading import load_config
from configs.schema import RunConfig
from latent_control.distributions import rollout_seed
from latent_control.pretrained import CONFIG, read_shape
from latent_control.search import (
    Best,
    ChunkDecoder,
    Judge,
    SearchResponse,
    SearchResult,
    SearchSettings,
    best_of_n,
    best_of_tokens,
    learned_value,
    play_once,
    search,
)
from pipeline.evaluation.statistics import paired_difference, success_interval
from pipeline.experiments.search_models import checked_q, decoder_of, load_latent, require_fit
from pipeline.runs.layout import CONFIG as RUN_CONFIG
from pipeline.runs.policies import checkpoint_of
from pipeline.tracking.results import keep
from rollout_workers.model_host import Host
from rollout_workers.tasks import EpisodeTask, Prompt, Score, Task, build_task
from rollout_workers.tasks.encoding import decode_response, encode_prompt
from rollout_workers.tasks.rewards import Response as Text
from rollout_workers.tasks.rewards import judge

PEEKS = (
    "the value is the task's own verifier: best-of-n is then pass@n, and both rows choose by the truth. They say how "
    "well each explores, not what is gained where no verifier is at hand"
)
BLIND = "the value is the Q head: no row sees the verifier, which only counts the successes"


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The options of a search.

    ``SearchOptions(method="mcts", iterations=64, chunk=4, c=0.7, width=4, prompts=64, value="verifier", seed=None)``
    """

    method: str = "mcts"
    iterations: int = 64
    chunk: int = 4
    c: float = 0.7
    width: int = 4
    prompts: int = 64
    value: str = "verifier"
    temperature: float | None = None
    """Of all rows but greedy; ``None``: the rollouts' own"""
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class SearchSession:
    """A loaded policy with its task and prompts."""

    checkpoint: Path
    run_dir: Path
    config: RunConfig
    host: Host
    task: Task
    prompts: Sequence[Prompt]
    encoded: Sequence[tuple[int, ...]]
    decoder: ChunkDecoder
    seed: int


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """The results of one method on P prompts."""

    name: str
    successes: list[bool]
    tokens: list[int]
    """Generated for each prompt, whole responses and chunks that came to nothing alike"""
    responses: list[int]
    """Whole responses that were valued"""
    seconds: float
    """Of all prompts, the verifier included"""
    more: dict[str, float] = field(default_factory=dict)


def prepare(target: Path, options: SearchOptions, q: Path | None) -> SearchSession:
    """Load the policy and its task.

    Raises: ValueError: no such checkpoint, a Q head that is missing or made for another model, or settings that cannot
        work.
    """
    checkpoint, run_dir = checkpoint_of(target)
    if not (checkpoint / CONFIG).is_file():
        raise ValueError(
            f"{checkpoint} is not a latent-action checkpoint (it has no {CONFIG}): search needs a latent policy"
        )
    config = load_config(run_dir / RUN_CONFIG, [], check_paths=False)
    shape = read_shape(checkpoint)
    if options.chunk % shape.span:
        raise ValueError(
            f"--chunk is {options.chunk}, but a code lasts for {shape.span} tokens: choose a multiple of {shape.span}"
        )
    if q is None and (options.method == "mcts-q" or options.value == "q"):
        raise ValueError(
            f"--method {options.method} --value {options.value} needs a Q head: train one with latent-control train-q "
            "RUN, give --q"
        )
    if options.temperature is not None and options.temperature <= 0:
        raise ValueError(
            f"--temperature is {options.temperature}: a search needs responses that differ, give more than 0"
        )
    settings_of(options, config)
    task = build_task(config.task)
    if isinstance(task, EpisodeTask):
        raise ValueError(f"search looks for single responses, but {task.name} has several turns")
    heldout = task.prompts("heldout")
    if options.prompts > len(heldout):
        raise ValueError(
            f"--prompts is {options.prompts}, but {task.name} has {len(heldout)} held-out prompts: ask for fewer"
        )
    head = None if q is None else checked_q(q)
    host = load_latent(checkpoint, config)
    if head is not None:
        require_fit(head.shape, host, q)
    prompts = [heldout[index] for index in range(options.prompts)]
    return SearchSession(
        checkpoint=checkpoint,
        run_dir=run_dir,
        config=config,
        host=host,
        task=task,
        prompts=prompts,
        encoded=[tuple(encode_prompt(host.tokenizer, prompt, chat=config.task.chat)) for prompt in prompts],
        decoder=decoder_of(host, config, head, options.temperature),
        seed=config.seed if options.seed is None else options.seed,
    )


def settings_of(options: SearchOptions, config: RunConfig) -> SearchSettings:
    """The settings of the tree search."""
    return SearchSettings(
        iterations=options.iterations,
        chunk=options.chunk,
        c=options.c,
        width=options.width,
        max_new_tokens=config.rollout.max_new_tokens,
        guided=options.method == "mcts-q",
    )


def verdict(session: SearchSession, number: int, response: SearchResponse) -> tuple[bool, float]:
    """(success, value in [0, 1]) by the run's own reward; a verifier that fails counts as 0."""
    text = Text(
        text=decode_response(session.host.tokenizer, response.tokens, session.config.rollout.stop),
        new_tokens=len(response.tokens),
        limit=session.config.rollout.max_new_tokens,
        stopped=response.stopped,
    )
    found = judge(session.task, session.config.reward, session.prompts[number], text)
    return (found.success, min(1.0, max(0.0, found.reward))) if isinstance(found, Score) else (False, 0.0)


def value_of(session: SearchSession, options: SearchOptions) -> Judge:
    """The value function of whole responses."""
    return learned_value if options.value == "q" else lambda number, response: verdict(session, number, response)[1]


def play(session: SearchSession, options: SearchOptions) -> dict[str, Any]:
    """Run all methods. Each has its own random streams, derived from the seed, the prompt's number and the method's."""
    value = value_of(session, options)
    longest = session.config.rollout.max_new_tokens

    def seeds(kind: int) -> list[int]:
        return [rollout_seed(session.seed, number, kind) >> 1 for number in range(len(session.prompts))]

    once = partial(play_once, session.decoder, session.encoded, max_new_tokens=longest, seeds=seeds(11))
    rows = [
        timed(session, "greedy", partial(once, greedy=True)),
        timed(session, "sampled", partial(once, greedy=False)),
    ]
    if options.method == "best-of-n":
        several = partial(
            best_of_n,
            session.decoder,
            session.encoded,
            value,
            n=options.iterations,
            max_new_tokens=longest,
            seeds=seeds(12),
        )
        return result_of(session, options, [*rows, timed(session, "best-of-n", several)])
    settings = settings_of(options, session.config)
    tree = timed(
        session, options.method, partial(search, session.decoder, session.encoded, value, settings, seeds=seeds(13))
    )
    equal = partial(
        best_of_tokens,
        session.decoder,
        session.encoded,
        value,
        budgets=tree.tokens,
        max_new_tokens=longest,
        seeds=seeds(12),
    )
    return result_of(session, options, [*rows, timed(session, "best-of-n", equal), tree])


def timed(session: SearchSession, name: str, answer: Callable[[], Sequence[Best | SearchResult]]) -> MethodResult:
    """Run a method and measure its seconds; success is always the verifier's."""
    started = time.perf_counter()
    found: Sequence[Best | SearchResult] = answer()
    seconds = time.perf_counter() - started
    trees = [one for one in found if isinstance(one, SearchResult)]
    return MethodResult(
        name=name,
        successes=[verdict(session, number, one.response)[0] for number, one in enumerate(found)],
        tokens=[one.tokens for one in found],
        responses=[one.responses for one in found],
        seconds=seconds,
        more={
            "cache_mb_per_prompt": max(one.cache_bytes for one in trees) / 2**20,
            "nodes": mean([one.nodes for one in trees]),
        }
        if trees
        else {},
    )


def result_of(session: SearchSession, options: SearchOptions, rows: Sequence[MethodResult]) -> dict[str, Any]:
    """The results as plain data."""
    by_name = {row.name: np.array(row.successes, float) for row in rows}
    differences = {}
    if options.method != "best-of-n":
        pair = by_name[options.method], by_name["best-of-n"]
        differences[f"{options.method} - best-of-n"] = paired_difference(*pair, seed=session.seed)
    return {
        "checkpoint": session.checkpoint.name,
        "task": session.config.task.name,
        "asked": asdict(options) | {"seed": session.seed},
        "rows": [numbers(row) for row in rows],
        "differences": differences,
        "successes": {row.name: [int(success) for success in row.successes] for row in rows},
        "note": PEEKS if options.value == "verifier" else BLIND,
    }


def record(session: SearchSession, result: dict[str, Any]) -> Path:
    """Keep a result in the run folder (``search/<checkpoint>_<method>-<n>.json``) and, when the run is tracked, in
    MLflow."""
    metrics = {f"{row['name']}/{key}": value for row in result["rows"] for key, value in row.items() if key != "name"}
    metrics |= {f"{name}/{key}": value for name, found in result["differences"].items() for key, value in found.items()}
    asked = result["asked"]
    name = f"{session.checkpoint.name}_{asked['method']}"
    return keep(
        result, session.run_dir, session.config.tracking, folder="search", name=name, params=asked, metrics=metrics
    )


def numbers(row: MethodResult) -> dict[str, Any]:
    """A row of the printed table."""
    count = len(row.successes)
    low, high = success_interval(sum(row.successes), count)
    return {
        "name": row.name,
        "success": sum(row.successes) / count,
        "low": low,
        "high": high,
        "tokens_per_prompt": mean(row.tokens),
        "responses_per_prompt": mean(row.responses),
        "seconds_per_prompt": row.seconds / count,
        **row.more,
    }


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)
