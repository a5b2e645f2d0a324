"""What the fields of a config must be to each other; plain functions that return messages and import nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from configs.gates import gate_problems
from configs.install import install_command
from configs.schema import Base, DataSource, RunConfig, Training

# Accelerate's own ways to split a model; ours is ``shard``, whose checkpoints any number of workers can read.
SHARDING = {"fsdp_plugin", "deepspeed_plugin", "megatron_lm_plugin", "parallelism_config"}

GROUPED = ("grpo", "dr_grpo", "rloo")
"""Algorithms that compare the rollouts of a prompt with each other alone."""
TEXT_TOKENS = 256
"""Of a piece of text, where ``max_length`` is not set."""


def cross_field_problems(config: RunConfig) -> list[str]:
    """One message, with the remedy, for each contradiction between fields."""
    checks = (
        _stages,
        _finetune,
        _improve_offline,
        _improve,
        _update,
        _staleness,
        _choice_of_prompts,
        _batches,
        _actions,
        _data,
        _tools,
        _rollout,
        _evaluation,
        gate_problems,
        _reward,
        _tracking,
        _autoscale,
    )
    return [message for check in checks for message in check(config)]


def simulation_warning(config: RunConfig) -> list[str]:
    """What is to be said, loudly, of a run whose rollouts are noise."""
    if config.rollout.engine != "simulated" or config.improve is None:
        return []
    return [
        "SIMULATED: rollout.engine is simulated, so rollouts, rewards and the improved policy are NOISE; only "
        "times and sizes count"
    ]


def offline_sections(config: RunConfig) -> Iterator[tuple[str, Training]]:
    """Dotted name and settings of each offline stage that is on."""
    named = (
        ("base.train", config.base.train),
        ("actions", config.actions),
        ("clone", config.clone),
        ("finetune", config.finetune),
    )
    every: tuple[tuple[str, Training | None], ...] = (*named, ("improve_offline", config.improve_offline))
    return ((name, section) for name, section in every if section is not None)


def row_length(config: RunConfig, section: Training) -> int:
    """Tokens to which a stage cuts its rows: ``max_length``, else what prompt and response may have together (of texts
    256)."""
    if section.max_length is not None:
        return section.max_length
    if section.data and all(source.kind == "text" for source in section.data):
        return TEXT_TOKENS
    prompts = [config.task, *(source.task for source in section.data if source.task is not None)]
    return max(task.max_prompt_tokens for task in prompts) + config.rollout.max_new_tokens


def _stages(config: RunConfig) -> Iterator[str]:
    if not config.stages:
        yield "nothing to do: no stage is named; add actions, clone, improve or evaluation"
    reuse = "add actions, e.g. actions: {num_actions: 64}, or reuse a checkpoint: actions: {init: FOLDER, updates: 0}"
    if config.actions is None:
        later = (
            ("clone", config.clone),
            ("finetune", config.finetune),
            ("improve_offline", config.improve_offline),
            ("improve", config.improve),
        )
        for name, section in later:
            if section is not None:
                yield f"{name}: needs latent actions, but there is no actions section; {reuse}"
    elif config.clone is None and config.actions.init is None:
        latent = config.improve is not None and config.improve.level == "latent"
        offline = config.improve_offline is not None
        for name, needs in (
            ("finetune", config.finetune is not None),
            ("improve_offline", offline),
            ("improve", latent),
        ):
            if needs:
                yield (
                    f"{name}: needs a cloned policy, but there is no clone section; add clone, or set actions.init "
                    "to a cloned one"
                )


def _finetune(config: RunConfig) -> Iterator[str]:
    if config.finetune is not None and config.finetune.codes == "inverse_dynamics" and config.clone is None:
        yield (
            "finetune.codes: inverse_dynamics clones the policy again with clone's settings, but there is no clone "
            "section; add clone, or set finetune.codes: policy"
        )


def _improve_offline(config: RunConfig) -> Iterator[str]:
    section = config.improve_offline
    if section is None:
        return
    for index, source in enumerate(section.data):
        if source.kind != "replay":
            yield (
                f"improve_offline.data[{index}].kind: {source.kind} has no rewards; set kind: replay and a run "
                "folder's path"
            )
    if section.shard:
        yield (
            "improve_offline.shard: true, but this stage keeps the base's features of each worker's own rollouts; "
            "set shard: false"
        )
    if section.policy_versions is not None and section.policy_versions[0] > section.policy_versions[1]:
        first, last = section.policy_versions
        yield f"improve_offline.policy_versions: [{first}, {last}] holds no version; write the smaller one first"


def _improve(config: RunConfig) -> Iterator[str]:
    improve = config.improve
    if improve is None:
        return
    if improve.algorithm in ("grpo", "dr_grpo", "rloo") and improve.group_size < 2:
        yield (
            f"improve.group_size: {improve.group_size}, but {improve.algorithm} compares rollouts of one prompt; "
            "set 2 or more"
        )
    if improve.algorithm == "ppo" and improve.token_trains == "all" and config.over_tokens:
        yield (
            "improve.token_trains: all trains the model whose frozen features ppo's critic reads; set last_blocks "
            "or added_blocks"
        )
    if improve.equivalent_codes is not None and config.actions is not None and config.actions.span > 1:
        yield (
            f"improve.equivalent_codes: {improve.equivalent_codes} compares single tokens, but a code lasts for "
            f"{config.actions.span}; leave it out"
        )
    if improve.equivalent_codes is not None and config.rollout.engine != "local":
        yield (
            f"improve.equivalent_codes: {improve.equivalent_codes} needs rollout.engine: local, this is "
            f"{config.rollout.engine}; leave it out"
        )
    weights = config.reward.weights
    if improve.credit == "turn" and weights is not None and weights.get("score") != 1.0:
        yield (
            "improve.credit: turn moves the part score to where it came, so reward.weights must count it once: set "
            "score: 1.0, or null"
        )
    if improve.credit == "turn" and improve.algorithm not in ("ppo", "reinforce_pp"):
        yield (
            f"improve.credit: turn, but {improve.algorithm} compares whole rollouts; set algorithm: ppo or "
            "reinforce_pp, or leave it out"
        )
    if improve.kl_in == "reward" and improve.kl_coefficient == 0:
        yield (
            "improve.kl_in: reward, but improve.kl_coefficient is 0; set e.g. kl_coefficient: 0.01, or leave kl_in out"
        )
    if config.over_tokens and improve.token_trains == "lora" and find_spec("peft") is None:
        yield f"improve.token_trains: lora needs the package 'peft'; {install_command('lora')}"
    if improve.level == "token" and improve.token_baseline:
        yield (
            "improve.token_baseline: true adds a token-level run, but improve.level is token already; set "
            "token_baseline: false"
        )


def _update(config: RunConfig) -> Iterator[str]:
    """How an update's rollouts are cut and shared out."""
    improve = config.improve
    if improve is None:
        return
    rollouts = improve.prompts_per_update * improve.group_size
    prompts, learners = improve.prompts_per_update, max(1, config.cluster.num_learners)
    # RLlib would fill the last piece with rollouts it has used
    if prompts % learners == 0 and rollouts % (improve.minibatches * learners):
        yield (
            f"improve.minibatches: {improve.minibatches} pieces for each of {learners} learners do not divide the "
            f"{rollouts} rollouts "
            f"of an update (prompts_per_update x group_size); set a divisor of {rollouts // learners}"
        )
    if prompts % learners:
        yield (
            f"improve.prompts_per_update: {prompts} does not divide over cluster.num_learners = {learners}; set a "
            "multiple of it"
        )
    if improve.group_size > config.rollout.batch_size:
        yield (
            f"improve.group_size: {improve.group_size} rollouts of a prompt are decoded together; set "
            "rollout.batch_size to at least that"
        )
    if config.cluster.gpus_per_learner and not config.cluster.num_learners:
        gpus = config.cluster.gpus_per_learner
        yield (
            f"cluster.gpus_per_learner: {gpus}, but num_learners is 0: a learner in the driver gets no GPU from "
            "Ray; set num_learners: 1"
        )
    if improve.shard and config.cluster.num_learners < 2:
        yield (
            "improve.shard: true splits the policy over learners, but cluster.num_learners is "
            f"{config.cluster.num_learners}; set 2 or more, or shard: false"
        )
    if improve.warmup_updates > max(1, improve.updates):
        yield (
            f"improve.warmup_updates: {improve.warmup_updates} is more than improve.updates = {improve.updates}; "
            "set fewer"
        )


def _staleness(config: RunConfig) -> Iterator[str]:
    improve = config.improve
    if improve is None:
        return
    if improve.mode == "async" and improve.max_staleness == 0:
        yield (
            "improve.max_staleness: 0 with improve.mode async waits for every update; set improve.mode: sync, or "
            "max_staleness: 1 or more"
        )
    if improve.mode == "sync" and improve.stale != "wait":
        yield (
            f"improve.stale: {improve.stale} is for improve.mode async, only there rollouts grow stale; leave it "
            "out, or set mode: async"
        )
    if improve.mode == "sync" and improve.refresh_in_flight:
        yield (
            "improve.refresh_in_flight: true is for improve.mode async, this is sync; leave it out, or set mode: async"
        )
    if improve.refresh_in_flight and config.rollout.engine != "local":
        yield (
            f"improve.refresh_in_flight: true needs rollout.engine: local, this is {config.rollout.engine}; leave "
            "it out"
        )
    if improve.stale == "reweight" and improve.importance_cap is None:
        yield (
            "improve.stale: reweight truncates weights at importance_cap, which is not set; set e.g. "
            "improve.importance_cap: 2.0"
        )


def _choice_of_prompts(config: RunConfig) -> Iterator[str]:
    """Dynamic sampling and curriculum go by the groups of an update, one update after the other."""
    improve = config.improve
    if improve is None:
        return
    named = {"dynamic_sampling": (improve.dynamic_sampling, 0), "curriculum": (improve.curriculum, 1)}
    for name, value, off in ((name, *values) for name, values in named.items()):
        if value == off:
            continue
        if improve.mode == "async":
            yield f"improve.{name}: {value:g} is for improve.mode sync, this is async; set {name}: {off}, or mode: sync"
    if improve.curriculum < 1 and improve.group_size == 1:
        yield (
            f"improve.curriculum: {improve.curriculum:g} compares a prompt's rollouts, but improve.group_size is 1; "
            "set 2 or more"
        )
    if not improve.dynamic_sampling:
        return
    if improve.algorithm not in GROUPED:
        yield (
            f"improve.dynamic_sampling: {improve.dynamic_sampling:g} leaves out groups of equal rewards, but "
            f"{improve.algorithm} learns from them; set dynamic_sampling: 0, or algorithm: {' or '.join(GROUPED)}"
        )
    if config.cluster.num_learners > 1:
        yield (
            f"improve.dynamic_sampling: {improve.dynamic_sampling:g}, but what is left of an update does not divide "
            f"over cluster.num_learners = {config.cluster.num_learners}; set num_learners: 1, or dynamic_sampling: 0"
        )


def _batches(config: RunConfig) -> Iterator[str]:
    for name, section in offline_sections(config):
        workers = section.num_workers
        if section.batch_size % workers:
            yield (
                f"{name}.batch_size: {section.batch_size} does not divide over {name}.num_workers = {workers}; set "
                "a multiple of it"
            )
        for key in SHARDING & section.accelerate.keys():
            yield f"{name}.accelerate.{key}: set {name}.shard: true instead, which splits the model over the workers"
    if config.base.train is not None:
        yield from _architecture(config.base)


def _actions(config: RunConfig) -> Iterator[str]:
    actions = config.actions
    if actions is not None and actions.look_ahead is not None and actions.look_ahead < actions.span:
        yield (
            f"actions.look_ahead: {actions.look_ahead}, but a code explains {actions.span} tokens (actions.span); "
            "set as many, or null"
        )
    if actions is not None and actions.final_temperature > actions.temperature:
        first, last = actions.temperature, actions.final_temperature
        yield (
            f"actions.final_temperature: {last} is above actions.temperature = {first}, but it must not rise; swap them"
        )


def _architecture(base: Base) -> Iterator[str]:
    assert base.train is not None
    width, heads = base.train.architecture.hidden_size, base.train.architecture.num_attention_heads
    if width % heads:
        yield (
            f"base.train.architecture.hidden_size: {width} does not divide into num_attention_heads = {heads}; set "
            "a multiple of it"
        )


def _data(config: RunConfig) -> Iterator[str]:
    for name, section in offline_sections(config):
        if not section.data:
            replay = name == "improve_offline"
            remedy = (
                "write e.g. [{kind: replay, path: RUN_FOLDER}]"
                if replay
                else "leave it out for the task's demonstrations"
            )
            yield (
                f"{name}.data: an empty list; {remedy}{'' if replay else ', or write e.g. [{kind: text, path: FILE}]'}"
            )
        for index, source in enumerate(section.data):
            yield from _source(f"{name}.data[{index}]", source)


def _source(place: str, source: DataSource) -> Iterator[str]:
    if source.kind == "task" and source.path is not None:
        yield f"{place}.path: {source.path} is not read by kind task; set kind: text or kind: replay, or leave path out"
    if source.kind != "task" and source.path is None:
        yield (
            f"{place}.path: missing; kind {source.kind} reads {'a run folder' if source.kind == 'replay' else 'files'}"
        )
    if source.kind != "replay" and source.min_reward is not None:
        yield (
            f"{place}.min_reward: {source.min_reward} applies to kind replay only, this is kind {source.kind}; "
            "leave it out"
        )


def _tools(config: RunConfig) -> Iterator[str]:
    """Tools are told of, and their results given, by the chat template."""
    if config.task.tools is not None and not config.task.chat:
        yield "task.tools: needs task.chat: true, whose template tells the model of tools; set it, or leave tools out"
    if config.task.tools is not None and config.rollout.turns.max_turns == 1:
        yield "rollout.turns.max_turns: 1 leaves no response behind a tool's result; set 2 or more, or leave tools out"


def _rollout(config: RunConfig) -> Iterator[str]:
    top_k, actions, engine = config.rollout.top_k, config.actions, config.rollout.engine
    if engine == "simulated" and config.evaluation is not None:
        yield (
            "evaluation: rollout.engine is simulated, its rollouts are noise; set evaluation: null, or "
            "rollout.engine: local"
        )
    if engine == "local" and config.rollout.engine_options:
        yield (
            f"rollout.engine_options: engine local takes none, got {', '.join(config.rollout.engine_options)}; "
            "leave them out"
        )
    if engine != "local" and config.rollout.static_cache:
        yield f"rollout.static_cache: true is for rollout.engine local, this is {engine}; leave it out"
    if engine == "vllm" and actions is not None and actions.span > 1:
        yield (
            f"actions.span: {actions.span}, but rollout.engine vllm chooses a code for every token; set "
            "rollout.engine: local"
        )
    if engine == "vllm" and config.improve is not None:
        if config.improve.features == "ship":
            yield "improve.features: ship, but rollout.engine vllm cannot ship features; set auto or recompute"
        if config.over_tokens:
            yield (
                "rollout.engine: vllm decodes latent actions only, not a token-level policy; set rollout.engine: local"
            )
    if top_k is not None and actions is not None and actions.init is None and top_k > actions.num_actions:
        yield (
            f"rollout.top_k: {top_k} is more than actions.num_actions = {actions.num_actions}; set fewer, or null "
            "for all"
        )


def _reward(config: RunConfig) -> Iterator[str]:
    weights = config.reward.weights
    if weights is not None and not any(weights.values()):
        yield (
            f"reward.weights: {weights} rewards nothing; give a part a weight, e.g. {{success: 1.0}}, or null for "
            "the task's own reward"
        )


def _evaluation(config: RunConfig) -> Iterator[str]:
    improve, evaluation = config.improve, config.evaluation
    if improve is not None and improve.evaluate_every is not None and config.rollout.engine == "simulated":
        yield "improve.evaluate_every: rollout.engine is simulated, its rollouts are noise; set evaluate_every: null"
    if evaluation is None:
        return
    samples = evaluation.samples_per_prompt
    if evaluation.pass_at and max(evaluation.pass_at) > samples:
        most = max(evaluation.pass_at)
        yield (
            f"evaluation.pass_at: {most} is more than evaluation.samples_per_prompt = {samples}; set "
            f"samples_per_prompt: {most} or more"
        )
    if evaluation.embedder is not None and samples < 2:
        yield (
            "evaluation.embedder: compares the responses to a prompt, but evaluation.samples_per_prompt is 1; set 2 "
            "or more"
        )
    if samples > config.rollout.batch_size:
        yield (
            f"evaluation.samples_per_prompt: {samples} responses are decoded together; set rollout.batch_size to at "
            "least that"
        )
    if evaluation.retention is not None:
        yield from _source("evaluation.retention", evaluation.retention)


def _tracking(config: RunConfig) -> Iterator[str]:
    uri = config.tracking.uri
    known = ("sqlite:///", "postgresql", "mysql", "mssql", "http://", "https://", "databricks")
    if uri is not None and not uri.startswith(known):
        yield (
            f"tracking.uri: {uri!r} is not an MLflow address; e.g. sqlite:////absolute/mlflow.db or http://host:5000, "
            "or null for the default"
        )
    if uri is not None and uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        yield (
            f"tracking.uri: {uri!r} is relative to wherever the process runs; write four slashes, "
            "sqlite:////absolute/mlflow.db"
        )


def _autoscale(config: RunConfig) -> Iterator[str]:
    scale, workers = config.cluster.autoscale, config.rollout.num_workers
    if scale is None:
        return
    if not scale.min <= workers <= scale.max:
        yield (
            f"rollout.num_workers: {workers} is what a run starts with, but cluster.autoscale allows {scale.min} to "
            f"{scale.max}"
        )
    # One worker more halves the sampling at most. What the workers idle then must not already be too much, or it would
    # go to and fro.
    most = 2 * (1 - scale.learner_idle) / (2 - scale.learner_idle)
    if scale.workers_idle <= most:
        yield (
            f"cluster.autoscale.workers_idle: {scale.workers_idle} beside learner_idle = {scale.learner_idle} would "
            f"add and remove the same worker for ever; set more than {most:.2f}"
        )
