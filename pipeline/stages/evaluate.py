"""The last stage: every variant on the same held-out prompts, with what each cost and the verdicts of the gates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from configs.loading import load_config
from configs.plain_text import escaped
from configs.schema import RunConfig
from pipeline.evaluation.cost import variant_costs
from pipeline.evaluation.gates import Verdict, applicable, final_of, judge_gates, judgement, tags
from pipeline.pages.report.results import sentence
from pipeline.preflight.number_type import with_types_of
from pipeline.runs import manifest
from pipeline.runs.context import StageContext
from pipeline.runs.layout import CONFIG, EVALUATION, OUTCOMES, STAGE_RECORDS
from pipeline.runs.stage_table import EVALUATE
from pipeline.tracking.stage_record import described, tracking
from pipeline.tracking.tracker import Tracker


def evaluate_stage(
    context: StageContext, tracker: Tracker, summary: dict[str, Any]
) -> tuple[dict[str, Any], list[Verdict]]:
    """The last stage: all variants on the same held-out prompts, and the verdicts of the gates."""
    from pipeline.stages.play import evaluate as play
    from pipeline.stages.play import variants

    config = context.config
    assert config.evaluation is not None
    stages = {name: (context.run_dir / stage["checkpoint"]).resolve() for name, stage in summary["stages"].items()}
    with tracking(context, tracker, EVALUATE, list(stages.values())[-1]):
        hosts = variants(config, stages)
        context.log.begin(EVALUATE, len(hosts))
        result = play(
            config,
            hosts,
            prompts=config.evaluation.prompts,
            say=partial(_played, context, list(hosts)),
            outcomes_file=context.run_dir / OUTCOMES,
        )
        add_costs(config, result, summary["stages"])
        numbers = {f"{name}/{key}": v for name in hosts for key, v in result[name].items() if isinstance(v, float)}
        context.log.record(EVALUATE, 1, numbers)
        manifest.put_json(context.run_dir, EVALUATION, result)
        manifest.know(context.run_dir, [OUTCOMES])
        for name in (EVALUATION, OUTCOMES):
            tracker.artifact(context.run_dir / name)
        verdicts = judge_gates(config.gates, result, final_of(result))
        tracker.tag((tags(verdicts) if verdicts else {}) | described(context.run_dir, sentence(result)))
    return result, verdicts


def _played(context: StageContext, names: list[str], text: str) -> None:
    """A line of the evaluation: a variant's success, or a note."""
    context.log.message(f"evaluate {text}")
    if (name := text.partition(":")[0]) in names:
        context.log.advance(EVALUATE, names.index(name) + 1)


def add_costs(config: RunConfig, result: dict[str, Any], stages: Mapping[str, Any]) -> None:
    """Put into each variant's row what it cost to make."""
    level = config.improve.level if config.improve is not None else "latent"
    for name, cost in variant_costs(stages, level=level).items():
        if name in result:
            result[name] |= cost


def evaluate(target: Path, *, config: RunConfig | None, prompts: int | None) -> dict[str, Any]:
    """Evaluate a run folder (all its results) or one checkpoint (with the config of its run, or ``config``).

    Raises:
        ValueError: there is nothing to evaluate at ``target``, or no config says on which task.
    """
    from pipeline.stages.play import evaluate as play
    from pipeline.stages.play import first_base, variants
    from pipeline.stages.token_checkpoint import checkpoint_host
    from rollout_workers.rollouts import HostSpec

    run_dir = target if (target / CONFIG).is_file() else target.parent.parent
    own = load_config(run_dir / CONFIG, [], check_paths=False) if (run_dir / CONFIG).is_file() else None
    if config is None and own is None:
        raise ValueError(
            f"{target} is neither a run folder nor a checkpoint inside one: say on which task with --config"
        )
    config = own if config is None else config if own is None else with_types_of(config, own)
    assert config is not None
    count = prompts or (config.evaluation.prompts if config.evaluation else 512)
    common: dict[str, Any] = {"dtype": config.base.dtype, "trust_remote_code": config.base.trust_remote_code}
    if (target / CONFIG).is_file():
        records = {p.stem: json.loads(p.read_text()) for p in sorted((target / STAGE_RECORDS).glob("*.json"))}
        hosts = variants(config, {name: (target / record["checkpoint"]).resolve() for name, record in records.items()})
    else:
        records = {}
        hosts = {
            "base": HostSpec(level="base", checkpoint=first_base(config, {}), **common),
            target.name: checkpoint_host(target, common),
        }
    # A run keeps the outcomes of its evaluation; one without outcomes can be compared after this.
    file = target / OUTCOMES if records and not (target / OUTCOMES).exists() else None
    result = play(config, hosts, prompts=count, say=lambda text: print(escaped(text), flush=True), outcomes_file=file)
    if file is not None:
        manifest.know_own(target, file)
    add_costs(config, result, records)
    if gates := applicable(config.gates, result):
        result["gates"] = judgement(judge_gates(gates, result, final_of(result)))
    return result
