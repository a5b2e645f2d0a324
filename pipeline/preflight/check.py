"""Everything that can be wrong before work starts, found in seconds: no weights are read, no Ray is started.

Heavy imports happen inside the functions, so that the command line can import this file.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from configs.checks import cross_field_problems, offline_sections, simulation_warning
from configs.paths import missing_paths
from configs.schema import DataSource, RunConfig
from configs.task_options import preferences, reward_actors
from pipeline.runs.errors import first_line
from pipeline.runs.layout import REPLAY

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from rollout_workers.tasks import AgentTask, Task

DECODERS = "only decoder-only language models are supported"
TEXT_SUFFIXES = (".jsonl", ".parquet", ".txt")


class Findings(NamedTuple):
    """What ``check`` found, e.g. ``Findings(errors=["rollout.num_workers: ..."], warnings=[])``; unpacks as a pair."""

    errors: list[str]
    """Each stops the run."""
    warnings: list[str]
    """What could not be checked on this machine, and what is not to be overlooked."""


SAMPLES = "-samples.jsonl"
"""End of the name of a file that ``latent-control sample`` makes."""


class Unreachable(Exception):
    """The model is neither here nor to be had from the hub now."""


def check(config: RunConfig) -> Findings:
    """All errors and warnings of ``config`` at once; takes seconds."""
    errors = cross_field_problems(config) + missing_paths(config.model_dump(mode="json"))
    warnings = simulation_warning(config)
    errors += _sources(config)
    errors += _engine(config)
    errors += _resources(config)
    errors += tracking_problems(config)
    task = _task(config, errors)
    if config.base.train is None and not any(e.startswith("base.model:") for e in errors):
        _with_base(config, task, errors, warnings)
    return Findings(errors=list(dict.fromkeys(errors)), warnings=warnings)


def _task(config: RunConfig, errors: list[str]) -> Task | None:
    from rollout_workers.tasks import build_task
    from rollout_workers.tasks.rewards import unknown_parts

    try:
        task = build_task(config.task)
        if not len(task.prompts("train")) or not len(task.prompts("heldout")):
            errors.append(f"task: {config.task.name} with these options has no prompts; widen task.options")
        errors += unknown_parts(task, config.reward)
    except ValueError as error:
        errors.append(_placed("task", error))
        return None
    if config.evaluation is not None and config.evaluation.slices:
        from pipeline.evaluation.slices import field_problems

        prompts = task.prompts("heldout")
        errors += field_problems(
            config.evaluation.slices, [prompts[i].metadata for i in range(min(config.evaluation.prompts, len(prompts)))]
        )
    return task


def _with_base(config: RunConfig, task: Task | None, errors: list[str], warnings: list[str]) -> None:
    """The checks that need the base LM's config and tokenizer."""
    try:
        model, tokenizer = base_config_and_tokenizer(config)
    except Unreachable as error:
        # The driver of a job on a cluster may reach what this machine cannot.
        (errors if config.cluster.address == "local" else warnings).append(f"base.model: {error}")
        return
    except ValueError as error:
        errors.append(_placed("base.model", error))
        return
    misshaped = list(_shape(config, model))
    errors += misshaped
    if not any(error.startswith("base.model:") for error in misshaped):
        errors += _files(config, warnings)
    if task is not None:
        errors += _one_prompt(config, task, model, tokenizer)


def base_config_and_tokenizer(config: RunConfig) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Of the base LM, without its weights; the local copy first, then the hub.

    Raises:
        Unreachable: a hub id that is not cached, and the hub does not answer.
        ValueError: what is there is no language model.
    """
    from latent_control.bases.foreign_code import NeedsCode
    from latent_control.bases.loading import load_config
    from latent_control.text import load_tokenizer

    folder, tokenizer_folder = _base_folders(config.base.model)
    trust = config.base.trust_remote_code
    for local_only in (True, False):
        if not local_only and not _hub_answers():
            raise Unreachable(
                f"{config.base.model} is neither a folder nor cached here, and the hub does not answer; download it "
                "first, or give a folder"
            )
        try:
            return (
                load_config(folder, trust_remote_code=trust, local_files_only=local_only),
                load_tokenizer(tokenizer_folder, trust_remote_code=trust, local_files_only=local_only),
            )
        except NeedsCode:
            raise
        except (OSError, ValueError, KeyError) as error:
            if Path(folder).is_dir():
                raise ValueError(f"{folder} is no language model with a tokenizer: {first_line(error)}") from error
            if not local_only:
                raise Unreachable(
                    f"{config.base.model} is neither a folder, nor cached, nor to be had from the hub: "
                    f"{first_line(error)}"
                ) from error
    raise AssertionError("one of the two tries returns or raises")


def _base_folders(model: str) -> tuple[str, str]:
    """Where config and tokenizer are; the config of an adapted base is its base's."""
    from latent_control.bases import adapters, smollm2

    if adapters.is_adapter(model):
        return adapters.adapted_base(model), adapters.tokenizer_source(model)
    folder = str(smollm2.smollm2_folder()) if model == smollm2.NAME else model
    return folder, folder


def _files(config: RunConfig, warnings: list[str]) -> Iterator[str]:
    """Whether the files of the base LM, of its adapter and of the text encoder hold all of them; no weight is read."""
    from latent_control.bases import adapters
    from latent_control.bases.loading import BASE, ENCODER, judge

    model, trust = config.base.model, config.base.trust_remote_code
    try:
        if adapters.is_adapter(model):
            problems, unjudged = adapters.adapter_problems(model, trust_remote_code=trust)
        else:
            problems, unjudged, _ = judge(_base_folders(model)[0], BASE, trust_remote_code=trust)
    except ValueError as error:
        yield _placed("base.model", error)
        return
    yield from (f"base.model: {problem}" for problem in problems)
    if unjudged:
        warnings.append(f"base.model: {unjudged}")
    if config.evaluation is not None and config.evaluation.embedder is not None:
        try:
            found = judge(config.evaluation.embedder, ENCODER, trust_remote_code=False, key=None)
        except ValueError as error:
            yield _placed("evaluation.embedder", error)
            return
        yield from (f"evaluation.embedder: {problem}" for problem in found.problems)


def _hub_answers() -> bool:
    """Asked once with a short patience: transformers would retry for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(constants.ENDPOINT, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def _shape(config: RunConfig, model: PreTrainedConfig) -> Iterator[str]:
    """Blocks and heads asked for against those of the base LM."""
    text = model.get_text_config()
    depth, width, heads = (
        getattr(text, name, None) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    if depth is None or width is None:
        yield (
            f"base.model: {config.base.model} ({model.model_type}) names no num_hidden_layers and hidden_size; "
            f"{DECODERS}"
        )
        return
    if getattr(model, "is_encoder_decoder", False):
        yield f"base.model: {config.base.model} ({model.model_type}) is an encoder-decoder; {DECODERS}"
    if heads and not getattr(text, "head_dim", None) and width % heads:
        yield f"base.model: hidden_size {width} does not divide into {heads} attention heads"
    for name, blocks, late in _block_counts(config):
        limit = depth - 1 if late else depth
        if blocks > limit:
            why = f"reading late, at most {limit} of them" if late else f"at most {limit}"
            yield f"{name}: {blocks} blocks, but the base LM has {depth}; {why}"


def _block_counts(config: RunConfig) -> Iterator[tuple[str, int, bool]]:
    """Name, number of blocks, and whether one more must stay below them."""
    actions, improve = config.actions, config.improve
    if actions is not None:
        yield (
            "actions.inverse_dynamics_layers",
            actions.inverse_dynamics_layers,
            actions.inverse_dynamics_reads == "late",
        )
        yield "actions.policy_layers", actions.policy_layers, actions.policy_reads == "late"
    if improve is not None and improve.token_blocks is not None:
        yield "improve.token_blocks", improve.token_blocks, improve.token_trains == "last_blocks"


def _one_prompt(
    config: RunConfig, task: Task, model: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """Plays prompts through encoding and one answer through the verifier."""
    from rollout_workers.tasks import AgentTask
    from rollout_workers.tasks.encoding import decode_response, encode_prompt

    if isinstance(task, AgentTask):
        yield from _one_episode(config, task, model)
        return
    prompts = task.prompts("heldout")
    try:
        lengths = [
            len(encode_prompt(tokenizer, prompts[i], chat=config.task.chat)) for i in range(min(8, len(prompts)))
        ]
        answer = decode_response(tokenizer, tokenizer("1", add_special_tokens=False)["input_ids"])
    except ValueError as error:
        yield _placed("task", error)
        return
    longest, limit = max(lengths), config.task.max_prompt_tokens
    if longest > limit:
        yield (
            f"task.max_prompt_tokens: {limit}, but a prompt of {task.name} has {longest} tokens; set {longest}, or "
            "fewer task.shots"
        )
    window, wanted = getattr(model.get_text_config(), "max_position_embeddings", None), config.rollout.max_new_tokens
    if window and longest + wanted > window:
        room = max(0, window - longest)
        yield (
            f"rollout.max_new_tokens: {wanted} after a prompt of {longest} tokens passes the window of {window}; "
            f"set at most {room}"
        )
    yield from _one_answer(config, task, answer)


def _one_answer(config: RunConfig, task: Task, answer: str) -> Iterator[str]:
    """Through the verifier; of reward models only the configs are read."""
    from rollout_workers.tasks import Failure

    models = [str(section["model"]) for section in preferences(config.task.model_dump())]
    try:
        if models:
            from latent_control.preference import require_reward_model

            for model in models:
                require_reward_model(model)
            return
        score = task.score(task.prompts("heldout")[0], answer)
    except ValueError as error:
        yield _placed("task", error)
        return
    if isinstance(score, Failure):
        yield f"task: the verifier of {task.name} cannot judge an answer: {score.kind}: {score.message}"


def _one_episode(config: RunConfig, task: AgentTask, model: PreTrainedConfig) -> Iterator[str]:
    """Begins an episode, and compares the longest one there can be with the base LM's window."""
    from rollout_workers.tasks import Failure

    window, wanted = getattr(model.get_text_config(), "max_position_embeddings", None), config.rollout.turns.max_tokens
    if window and wanted > window:
        yield f"rollout.turns.max_tokens: {wanted} passes the window of {window}; set at most {window}"
    if config.clone is not None and config.clone.fit_temperature:
        yield f"clone.fit_temperature: plays single responses, but {task.name} is played in turns; leave it out"
    score = task.score(task.prompts("heldout")[0], "")
    if isinstance(score, Failure):
        yield f"task: {score.message}"


def _sources(config: RunConfig) -> Iterator[str]:
    """Text files and replay folders that are there: readable, of a known kind, not empty. Other tasks: as the run's
    own."""
    from rollout_workers.tasks import build_task

    for name, section in offline_sections(config):
        for index, source in enumerate(section.data):
            if source.task is not None:
                try:
                    build_task(source.task)
                except ValueError as error:
                    missing = str(source.task.options.get("path", ""))
                    made = missing.endswith(SAMPLES) and not Path(missing).exists()
                    yield f"{name}.data[{index}].task: {error}" + (
                        ", made by latent-control sample CONFIG" if made else ""
                    )
            if source.path is not None and Path(source.path).exists():
                problem = _replay_problem(Path(source.path)) if source.kind == "replay" else _text_problem(source)
                if problem:
                    yield f"{name}.data[{index}].path: {problem}"


def _replay_problem(folder: Path) -> str | None:
    shards = [folder, folder / REPLAY] if folder.is_dir() else []
    if any(next(place.rglob("*.parquet"), None) for place in shards if place.is_dir()):
        return None
    return f"{folder} holds no replay shards (*.parquet); give a run folder whose improve stage ran with replay.enabled"


def _text_problem(source: DataSource) -> str | None:
    assert source.path is not None
    path = Path(source.path)
    files = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES) if path.is_dir() else [path]
    if not files:
        return f"{path} holds no {', '.join(TEXT_SUFFIXES)} file"
    if files[0].suffix not in TEXT_SUFFIXES:
        return f"{path} is no {', '.join(TEXT_SUFFIXES)} file"
    empty = next((p for p in files if p.stat().st_size == 0), None)
    if empty is not None:
        return f"{empty} is empty"
    unreadable = next((p for p in files if not os.access(p, os.R_OK)), None)
    return f"{unreadable} is not readable" if unreadable is not None else _column_problem(files[0], source.column)


def _column_problem(path: Path, column: str) -> str | None:
    """Whether the first row has the column."""
    if path.suffix == ".txt":
        return None
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            first = next((line for line in lines if line.strip()), "")
        try:
            row = json.loads(first)
        except json.JSONDecodeError as error:
            return f"the first line of {path} is no JSON object: {error}"
        names = list(row) if isinstance(row, dict) else []
    else:
        import pyarrow.parquet

        try:
            names = pyarrow.parquet.read_schema(path).names
        except (OSError, ValueError) as error:
            return f"{path} is no readable Parquet file: {first_line(error)}"
    return (
        None
        if column in names
        else f"{path} has no column {column!r} (it has {', '.join(map(str, names)) or 'none'}); set column"
    )


def _engine(config: RunConfig) -> Iterator[str]:
    """The options of an engine that has some, and whether it is there."""
    if config.rollout.engine == "local":
        return
    from rollout_workers.engines import simulated, vllm

    try:
        {"simulated": simulated.read_options, "vllm": vllm.read_options}[config.rollout.engine](config.rollout)
    except ValueError as error:
        yield _placed("rollout", error)
    if config.rollout.engine == "vllm" and config.cluster.address == "local" and find_spec("vllm") is None:
        yield (
            "rollout.engine: vllm is not installed in this environment; docs/vllm.md has the lines, or set "
            "rollout.engine: local"
        )


def _resources(config: RunConfig) -> Iterator[str]:
    """CPUs and GPUs asked for against those here; only when Ray runs here."""
    if config.cluster.address != "local":
        return
    yield from _asked("GPU", gpus_here(), _gpus(config), "this machine has", "or set cluster.address")
    yield from _asked("CPU", cpus_here(), _cpus(config), "this machine has", "or set cluster.address")


def _asked(kind: str, there: float, wanted: dict[str, float], who: str, remedy: str) -> Iterator[str]:
    total = sum(wanted.values())
    if total > there:
        terms = " + ".join(f"{name} = {amount:g}" for name, amount in wanted.items() if amount)
        biggest = max(wanted, key=lambda name: wanted[name])
        place = biggest.split(" x ")[0]
        yield f"{place}: {total:g} {kind}s asked for ({terms}), but {who} {there:g}; ask for less, {remedy}"


def cluster_problems(config: RunConfig, nodes: Sequence[Mapping[str, float]]) -> list[str]:
    """What the config asks for against a cluster's nodes, e.g. ``[{"CPU": 8, "GPU": 1}]``: in total, and each actor on
    one of them."""
    there = f"the cluster's {len(nodes)} nodes have"
    problems = [
        message
        for kind, wanted in (("GPU", _gpus(config)), ("CPU", _cpus(config)))
        for message in _asked(kind, sum(node.get(kind, 0) for node in nodes), wanted, there, "or add nodes")
    ]
    for name, needs in _actors(config):
        if not any(all(node.get(kind, 0) >= amount for kind, amount in needs.items()) for node in nodes):
            one = " and ".join(f"{amount:g} {kind}s" for kind, amount in needs.items() if amount)
            largest = max(nodes, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)), default={})
            has = f"{largest.get('CPU', 0):g} CPUs and {largest.get('GPU', 0):g} GPUs"
            problems.append(
                f"{name}: each needs {one} on one node, but no node has that (the largest: {has}); ask "
                "for less for each"
            )
    return problems


def _actors(config: RunConfig) -> Iterator[tuple[str, dict[str, float]]]:
    """What a single actor of each kind needs."""
    rollout, cluster = config.rollout, config.cluster
    if config.improve is not None or config.evaluation is not None:
        yield (
            "rollout.cpus_per_worker, rollout.gpus_per_worker",
            {"CPU": rollout.cpus_per_worker, "GPU": rollout.gpus_per_worker},
        )
    if config.improve is not None and cluster.num_learners:
        yield (
            "cluster.cpus_per_learner, cluster.gpus_per_learner",
            {"CPU": cluster.cpus_per_learner, "GPU": cluster.gpus_per_learner},
        )
    for name, section in offline_sections(config):
        if section.num_workers > 1:
            yield f"{name}.gpus_per_worker", {"CPU": 1.0, "GPU": float(section.gpus_per_worker)}


def _gpus(config: RunConfig) -> dict[str, float]:
    offline = {
        f"{name}.num_workers x {name}.gpus_per_worker": float(s.num_workers * s.gpus_per_worker)
        for name, s in offline_sections(config)
    }
    if config.improve is None:
        return _largest(offline)
    wanted = {
        "rollout.num_workers x rollout.gpus_per_worker": config.rollout.num_workers * config.rollout.gpus_per_worker
    }
    wanted["cluster.num_learners x cluster.gpus_per_learner"] = (
        max(1, config.cluster.num_learners) * config.cluster.gpus_per_learner
    )
    wanted["task.options.preference actors x gpus_per_actor"] = reward_actors(
        config.task.model_dump(), "gpus_per_actor"
    )
    # Stages run one after the other: the larger of the two demands counts.
    return max(wanted, _largest(offline), key=lambda demand: sum(demand.values()))


def _largest(demand: dict[str, float]) -> dict[str, float]:
    name = max(demand, key=lambda key: demand[key], default=None)
    return {} if name is None else {name: demand[name]}


def _cpus(config: RunConfig) -> dict[str, float]:
    if config.improve is None and config.evaluation is None:
        return {}
    # The driver asks Ray for none: with the learner in it, the workers may use all CPUs.
    learners = config.cluster.num_learners * config.cluster.cpus_per_learner
    workers = config.rollout.num_workers * config.rollout.cpus_per_worker
    return {
        "rollout.num_workers x rollout.cpus_per_worker": workers,
        "cluster.num_learners x cluster.cpus_per_learner": learners,
        "task.options.preference actors x cpus_per_actor": reward_actors(config.task.model_dump(), "cpus_per_actor"),
    }


def cpus_here() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus_here() -> int:
    """GPUs torch can see."""
    import torch

    return torch.cuda.device_count()


def tracking_problems(config: RunConfig) -> Iterator[str]:
    """Whether a store in a file has a folder to lie in."""
    uri = config.tracking.uri
    if config.tracking.enabled and uri is not None and uri.startswith("sqlite:////"):
        folder = Path(uri.removeprefix("sqlite:///")).parent
        if not folder.is_dir():
            yield f"tracking.uri: the folder {folder} does not exist; make it, or leave tracking.uri null"


def _placed(place: str, error: ValueError) -> str:
    """The message with its place in the config in front, unless it names one itself."""
    text = str(error).strip().partition("\n")[0] or type(error).__name__  # not cut: the remedy stands at the end
    return text if text.startswith((f"{place}.", f"{place} ")) else f"{place}: {text}"
