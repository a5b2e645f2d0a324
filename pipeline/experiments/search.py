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
import torch

from configs.loading import load_config
from configs.schema import RunConfig
from latent_control.decoding.sampling_params import special_tokens
from latent_control.distributions import rollout_seed
from latent_control.pretrained import CONFIG, base_hash, read_shape
from latent_control.search import (
    Best,
    ChunkDecoder,
    Found,
    Judge,
    Response,
    SearchSettings,
    best_of_n,
    best_of_tokens,
    learned_value,
    play_once,
    search,
)
from latent_control.search.q_head import QHead, QShape, load_q_head, read_q_shape
from pipeline.evaluation.statistics import paired_difference, wilson
from pipeline.experiments.off_policy import RUN_CONFIG, checkpoint_of
from pipeline.storage import checkpoints
from pipeline.tracking.tracker import keep
from rollout_workers.model_host import Host, load_host
from rollout_workers.rollouts import HostSpec
from rollout_workers.tasks import AgentTask, Prompt, Score, Task, build_task
from rollout_workers.tasks.encoding import decode_response, encode_prompt
from rollout_workers.tasks.rewards import Response as Text
from rollout_workers.tasks.rewards import judge

PEEKS = (
    "the value is the task's own verifier: best-of-n is then pass@n, and both rows choose by the truth. They say how "
    "well each explores, "
    "not what is gained where no verifier is at hand"
)
BLIND = "the value is the Q head: no row sees the verifier, which only counts the successes"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a user asks for.

    ``Asked(method="mcts", iterations=64, chunk=4, c=0.7, width=4, prompts=64, value="verifier", seed=None)``
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
class Table:
    """A loaded policy at its task."""

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
class Row:
    """One way to answer, on P prompts."""

    name: str
    successes: list[bool]
    tokens: list[int]
    """Generated for each prompt, whole responses and chunks that came to nothing alike"""
    responses: list[int]
    """Whole responses that were valued"""
    seconds: float
    """Of all prompts, the verifier included"""
    more: dict[str, float] = field(default_factory=dict)


# -- before work starts ------------------------------------------------------------------------------------------------


def prepare(target: Path, asked: Asked, q: Path | None) -> Table:
    """Load what is asked for, or say what does not fit.

    Raises: ValueError: no such checkpoint, a Q head that is missing or made for another model, or settings that cannot
        work.
    """
    checkpoint, run_dir = checkpoint_of(target)
    if not (checkpoint / CONFIG).is_file():
        raise ValueError(
            f"{checkpoint} is no latent-action checkpoint (it has no {CONFIG}): search needs a latent policy"
        )
    config = load_config(run_dir / RUN_CONFIG, [], check_paths=False)
    shape = read_shape(checkpoint)
    if asked.chunk % shape.span:
        raise ValueError(
            f"--chunk is {asked.chunk}, but a code lasts for {shape.span} tokens: choose a multiple of {shape.span}"
        )
    if q is None and (asked.method == "mcts-q" or asked.value == "q"):
        raise ValueError(
            f"--method {asked.method} --value {asked.value} needs a Q head: train one with latent-control train-q "
            "RUN, give --q"
        )
    if asked.temperature is not None and asked.temperature <= 0:
        raise ValueError(
            f"--temperature is {asked.temperature}: a search needs responses that differ, give more than 0"
        )
    settings_of(asked, config)
    task = build_task(config.task)
    if isinstance(task, AgentTask):
        raise ValueError(f"search looks for single responses, but {task.name} is played in turns")
    heldout = task.prompts("heldout")
    if asked.prompts > len(heldout):
        raise ValueError(
            f"--prompts is {asked.prompts}, but {task.name} has {len(heldout)} held-out prompts: ask for fewer"
        )
    head = None if q is None else checked_q(q)
    host = load_latent(checkpoint, config)
    if head is not None:
        require_fit(head.shape, host, q)
    prompts = [heldout[index] for index in range(asked.prompts)]
    return Table(
        checkpoint=checkpoint,
        run_dir=run_dir,
        config=config,
        host=host,
        task=task,
        prompts=prompts,
        encoded=[tuple(encode_prompt(host.tokenizer, prompt, chat=config.task.chat)) for prompt in prompts],
        decoder=decoder_of(host, config, head, asked.temperature),
        seed=config.seed if asked.seed is None else asked.seed,
    )


def settings_of(asked: Asked, config: RunConfig) -> SearchSettings:
    """The search's dials."""
    return SearchSettings(
        iterations=asked.iterations,
        chunk=asked.chunk,
        c=asked.c,
        width=asked.width,
        max_new_tokens=config.rollout.max_new_tokens,
        guided=asked.method == "mcts-q",
    )


def checked_q(folder: Path) -> QHead:
    """A Q head whose files are as they were written."""
    read_q_shape(folder)
    if problems := checkpoints.verify(folder):
        raise ValueError(
            f"the Q head in {folder} is damaged ({problems[0]}): train it again with latent-control train-q RUN"
        )
    return load_q_head(folder)


def require_fit(shape: QShape, host: Host, folder: Path | None) -> None:
    """``ValueError`` unless the Q head was trained on this base and these codes."""
    assert host.model is not None
    for what, wanted, found in (
        ("codebook and world model", host.world_hash, shape.world_hash),
        ("base LM", base_hash(host.model), shape.base_hash),
    ):
        if wanted != found:
            raise ValueError(
                f"the Q head in {folder} was trained with another {what} (hash {found[:12]}, the checkpoint's is "
                f"{wanted[:12]}): "
                "train one on a run with the same actions stage"
            )
    wanted, found = (
        _reads(host.model.config.policy_reads, host.model.config.late_blocks),
        _reads(shape.reads, shape.late_blocks),
    )
    if wanted != found:
        raise ValueError(
            f"the Q head in {folder} reads another state of the base ({found}) than the policy "
            f"({wanted}): train one for it"
        )


def _reads(reads: str, late_blocks: int) -> str:
    return f"{reads}, {late_blocks} blocks before the end" if reads == "late" else reads


def load_latent(checkpoint: Path, config: RunConfig) -> Host:
    """The policy with its world model, on the GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = HostSpec(
        level="latent",
        checkpoint=str(checkpoint),
        dtype=config.base.dtype,
        trust_remote_code=config.base.trust_remote_code,
    )
    return load_host(spec, device, torch.float32)


def decoder_of(host: Host, config: RunConfig, head: QHead | None, temperature: float | None) -> ChunkDecoder:
    """A decoder that samples as the run's rollouts did, or at another ``temperature``."""
    return ChunkDecoder(
        host.base,
        host.actor(),
        temperature=config.rollout.temperature if temperature is None else temperature,
        top_k=config.rollout.top_k,
        stop_tokens=special_tokens(host.base.lm, None)[0],
        q=None if head is None else head.to(host.base.lm.device),
    )


# -- the rows ----------------------------------------------------------------------------------------------------------


def verdict(table: Table, number: int, response: Response) -> tuple[bool, float]:
    """(success, value in [0, 1]) by the run's own reward; a verifier that fails counts as 0."""
    text = Text(
        text=decode_response(table.host.tokenizer, response.tokens),
        new_tokens=len(response.tokens),
        limit=table.config.rollout.max_new_tokens,
        stopped=response.stopped,
    )
    found = judge(table.task, table.config.reward, table.prompts[number], text)
    return (found.success, min(1.0, max(0.0, found.reward))) if isinstance(found, Score) else (False, 0.0)


def value_of(table: Table, asked: Asked) -> Judge:
    """What the search values whole responses by."""
    return learned_value if asked.value == "q" else lambda number, response: verdict(table, number, response)[1]


def play(table: Table, asked: Asked) -> dict[str, Any]:
    """All rows. Each draws from random streams of its own, made of the seed, the prompt's number and the row's."""
    value = value_of(table, asked)
    longest = table.config.rollout.max_new_tokens

    def seeds(kind: int) -> list[int]:
        return [rollout_seed(table.seed, number, kind) >> 1 for number in range(len(table.prompts))]

    once = partial(play_once, table.decoder, table.encoded, max_new_tokens=longest, seeds=seeds(11))
    rows = [timed(table, "greedy", partial(once, greedy=True)), timed(table, "sampled", partial(once, greedy=False))]
    if asked.method == "best-of-n":
        several = partial(
            best_of_n, table.decoder, table.encoded, value, n=asked.iterations, max_new_tokens=longest, seeds=seeds(12)
        )
        return result_of(table, asked, [*rows, timed(table, "best-of-n", several)])
    settings = settings_of(asked, table.config)
    tree = timed(table, asked.method, partial(search, table.decoder, table.encoded, value, settings, seeds=seeds(13)))
    equal = partial(
        best_of_tokens,
        table.decoder,
        table.encoded,
        value,
        budgets=tree.tokens,
        max_new_tokens=longest,
        seeds=seeds(12),
    )
    return result_of(table, asked, [*rows, timed(table, "best-of-n", equal), tree])


def timed(table: Table, name: str, answer: Callable[[], Sequence[Best | Found]]) -> Row:
    """A way to answer, with its seconds; success is always the verifier's."""
    started = time.perf_counter()
    found: Sequence[Best | Found] = answer()
    seconds = time.perf_counter() - started
    trees = [one for one in found if isinstance(one, Found)]
    return Row(
        name=name,
        successes=[verdict(table, number, one.response)[0] for number, one in enumerate(found)],
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


def result_of(table: Table, asked: Asked, rows: Sequence[Row]) -> dict[str, Any]:
    """Everything as plain data."""
    by_name = {row.name: np.array(row.successes, float) for row in rows}
    differences = {}
    if asked.method != "best-of-n":
        pair = by_name[asked.method], by_name["best-of-n"]
        differences[f"{asked.method} - best-of-n"] = paired_difference(*pair, seed=table.seed)
    return {
        "checkpoint": table.checkpoint.name,
        "task": table.config.task.name,
        "asked": asdict(asked) | {"seed": table.seed},
        "rows": [numbers(row) for row in rows],
        "differences": differences,
        "successes": {row.name: [int(success) for success in row.successes] for row in rows},
        "note": PEEKS if asked.value == "verifier" else BLIND,
    }


def record(table: Table, result: dict[str, Any]) -> Path:
    """Keep a result in the run folder (``search/<checkpoint>_<method>-<n>.json``) and, when the run is tracked, in
    MLflow."""
    metrics = {f"{row['name']}/{key}": value for row in result["rows"] for key, value in row.items() if key != "name"}
    metrics |= {f"{name}/{key}": value for name, found in result["differences"].items() for key, value in found.items()}
    asked = result["asked"]
    name = f"{table.checkpoint.name}_{asked['method']}"
    return keep(result, table.run_dir, table.config.tracking, folder="search", name=name, params=asked, metrics=metrics)


def numbers(row: Row) -> dict[str, Any]:
    """A row of the table."""
    count = len(row.successes)
    low, high = wilson(sum(row.successes), count)
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
