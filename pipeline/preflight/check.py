"""Checks of a config before work starts, in seconds: no weights are read, no Ray is started.

Heavy imports happen inside the functions, so that the command line can import this file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from configs import recipes
from configs.checks import cross_field_problems, simulation_warning
from configs.paths import missing_paths
from configs.schema import RunConfig
from configs.task_options import preferences
from pipeline.preflight.base_model import (
    Unreachable,
    base_config_and_tokenizer,
    file_problems,
    shape_problems,
    tuned_start,
)
from pipeline.preflight.data_sources import Builder, source_problems
from pipeline.preflight.number_type import slow_choices
from pipeline.preflight.problems import Findings, placed
from pipeline.preflight.prompts import Prompts
from pipeline.preflight.resources import local_problems
from pipeline.preflight.surroundings import ray_problems
from pipeline.storage.disk_space import folder_problems
from pipeline.tracking.uris import URI, heeded, tracking_uri

if TYPE_CHECKING:
    from rollout_workers.tasks import EpisodeTask, Task
    from rollout_workers.tasks.protocol import Split


def check(config: RunConfig) -> Findings:
    """All errors and warnings of ``config`` at once; takes seconds."""
    errors = cross_field_problems(config) + missing_paths(config.model_dump(mode="json"))
    warnings = simulation_warning(config) + tuned_start(config) + list(tracking_warnings(config))
    warnings += recipes.differing(config)
    build = Builder()
    errors += source_problems(config, build)
    errors += _engine(config)
    errors += local_problems(config)
    errors += ray_problems(config)
    errors += tracking_problems(config)
    task = check_task(config, build, errors, warnings)
    found = Findings(errors=errors, warnings=warnings, notes=[*recipes.filled(config)])
    if config.base.train is not None and task is not None:
        from learners.base_training import unsuitable

        errors += unsuitable(config.base.train, task, config.task.name)
    elif config.base.train is None and not any(e.startswith("base.model:") for e in errors):
        _with_base(config, task, build, found)
    return Findings(*(list(dict.fromkeys(lines)) for lines in found))


def check_task(config: RunConfig, build: Builder, errors: list[str], warnings: list[str]) -> Task | None:
    """The task of the config, where it can be built; what is wrong with it, its rows' own answers included."""
    from pipeline.preflight.answers import check_answers
    from rollout_workers.tasks.rewards import unknown_parts

    try:
        task = build(config.task)
        if not len(task.prompts("train")) or not len(task.prompts("heldout")):
            errors.append(f"task: {config.task.name} with these options has no prompts; widen task.options")
        errors += unknown_parts(task, config.reward)
        for lines, found in zip((errors, warnings), check_answers(task), strict=True):
            lines += found
    except ValueError as error:
        errors.append(placed("task", error))
        return None
    errors += [*_slice_problems(config, task), *_too_few(config, task)]
    return task


def _too_few(config: RunConfig, task: Task) -> Iterator[str]:
    """Numbers of different prompts that an update or a play asks for, and that the task lacks."""
    improve = config.improve
    if improve is None:
        return
    asked: list[tuple[str, int, Split]] = [("prompts_per_update", improve.prompts_per_update, "train")]
    asked += [("evaluate_prompts", improve.evaluate_prompts, "heldout")] if improve.evaluate_every else []
    for name, count, split in asked:
        if 0 < (there := len(task.prompts(split))) < count:
            yield f"improve.{name}: {count}, but the task has only {there} {split} prompts; set it to {there} or fewer"


def _slice_problems(config: RunConfig, task: Task) -> list[str]:
    """Fields that the evaluation is to be cut by, and that its prompts lack."""
    if config.evaluation is None or not config.evaluation.slices:
        return []
    from pipeline.evaluation.slices import field_problems

    prompts = task.prompts("heldout")
    asked = [prompts[i].metadata for i in range(min(config.evaluation.prompts, len(prompts)))]
    return field_problems(config.evaluation.slices, asked)


def _with_base(config: RunConfig, task: Task | None, build: Builder, found: Findings) -> None:
    """The checks that need the base LM's config and tokenizer."""
    errors, warnings, _ = found
    try:
        model, tokenizer = base_config_and_tokenizer(config)
    except Unreachable as error:
        # The driver of a job on a cluster may reach what this machine cannot.
        (errors if config.cluster.address == "local" else warnings).append(f"base.model: {error}")
        return
    except ValueError as error:
        errors.append(placed("base.model", error))
        return
    misshaped = list(shape_problems(config, model))
    errors += misshaped
    if not any(error.startswith("base.model:") for error in misshaped):
        errors += file_problems(config, warnings)
        warnings += slow_choices(config)
    if not any(error.startswith("base.model:") for error in misshaped):
        _texts(config, task, Prompts(config, model, tokenizer, build), found)


def _texts(config: RunConfig, task: Task | None, prompts: Prompts, found: Findings) -> None:
    """Encodes prompts and rows, and scores one answer."""
    from latent_control.text import encode_plain
    from rollout_workers.tasks import EpisodeTask
    from rollout_workers.tasks.encoding import decode_response

    if task is not None and (broken := list(prompts.template_problems(task))):
        found.errors.extend(broken)
        return
    found.errors.extend(prompts.problems(task, found))
    if isinstance(task, EpisodeTask):
        found.errors.extend(_one_episode(config, task, prompts.positions))
    elif task is not None:
        one = decode_response(prompts.tokenizer, encode_plain(prompts.tokenizer, "1", add_special_tokens=False))
        found.errors.extend(_one_answer(config, task, one))


def _one_answer(config: RunConfig, task: Task, answer: str) -> Iterator[str]:
    """Scores it with the verifier; of reward models only the configs are read."""
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
        yield placed("task", error)
        return
    if isinstance(score, Failure):
        yield f"task: the verifier of {task.name} cannot judge an answer: {score.kind}: {score.message}"


def _one_episode(config: RunConfig, task: EpisodeTask, window: int) -> Iterator[str]:
    """Starts an episode, and compares the longest possible one with the base LM's window."""
    from rollout_workers.gateway.task import GatewayTask
    from rollout_workers.tasks import Failure

    wanted = config.rollout.turns.max_tokens
    if wanted > window:
        yield f"rollout.turns.max_tokens: {wanted} passes the window of {window}; set at most {window}"
    if config.clone is not None and config.clone.fit_temperature:
        yield f"clone.fit_temperature: samples single responses, but {task.name} has several turns; leave it out"
    if isinstance(task, GatewayTask):
        return  # its program needs a policy to talk to
    score = task.score(task.prompts("heldout")[0], "")
    if isinstance(score, Failure):
        yield f"task: {score.message}"


def _engine(config: RunConfig) -> Iterator[str]:
    """Problems of the engine's options, and an engine that is not installed."""
    if config.rollout.engine == "local":
        return
    from rollout_workers.engines import simulated, vllm

    try:
        {"simulated": simulated.read_options, "vllm": vllm.read_options}[config.rollout.engine](config.rollout)
    except ValueError as error:
        yield placed("rollout", error)
    if config.rollout.engine == "vllm" and config.cluster.address == "local" and find_spec("vllm") is None:
        yield (
            "rollout.engine: vllm is not installed in this environment; docs/vllm.md has the lines, or set "
            "rollout.engine: local"
        )


def tracking_problems(config: RunConfig) -> Iterator[str]:
    """A store in a file whose folder does not exist or cannot be written; an address whose secrets were taken out."""
    uri = config.tracking.uri or os.environ.get(URI)
    if config.tracking.enabled:
        try:
            tracking_uri(uri, Path())
        except ValueError as error:
            yield str(error)
    if config.tracking.enabled and uri is not None and uri.startswith("sqlite:////"):
        folder = Path(uri.removeprefix("sqlite:///")).parent
        if not folder.is_dir():
            yield f"tracking.uri: the folder {folder} does not exist; make it, or leave tracking.uri null"
        else:
            yield from folder_problems(folder, "tracking.uri")


def tracking_warnings(config: RunConfig) -> Iterator[str]:
    """What the environment says of tracking, and a server that does not answer or refuses the login: a run goes on
    without it, and can be sent later."""
    yield from heeded(config.tracking)
    uri = config.tracking.uri or os.environ.get(URI)
    if config.tracking.enabled and uri is not None and uri.startswith(("http://", "https://")):
        from pipeline.tracking.mlflow_store import experiments

        try:
            experiments(uri)
        except ValueError as error:
            yield f"tracking.uri: {error}; a run goes on without it, latent-control sync RUN sends it later"
