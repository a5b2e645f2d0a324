"""Sides of a comparison start alike: the token level beside a fine-tuned model starts from the base LM's own SFT on the
same data, never from a base LM that was changed under codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from configs.gates import made_variants
from configs.schema import Finetune, RunConfig
from latent_control.pretrained import base_path
from latent_control.records import TokenBatch
from latent_control.text import load_tokenizer
from learners.learning_rate import learning_rate_share
from pipeline.data.batches import training_batches
from pipeline.evaluation.cost import variant_costs
from pipeline.evaluation.outcomes import Outcome
from pipeline.evaluation.results import Played, differences
from pipeline.experiments.compare import Finished, unlike
from pipeline.preflight.base_model import tuned_start
from pipeline.runs.stage_table import behind, planned
from pipeline.runs.status import finished
from pipeline.stages import offline_work
from pipeline.stages.improve import starting_point
from pipeline.stages.offline_job import OfflineJob
from pipeline.stages.plan import plan, sources_of
from pipeline.stages.play import variants
from rollout_workers.tasks import build_task

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from run_fixtures import QUICKSTART, call

pytest_plugins = ("rl_fixtures",)

TUNE: dict[str, Any] = {"updates": 4, "batch_size": 6, "max_length": 32, "warmup_updates": 2, "evaluation_sequences": 8}
TUNE |= {"learning_rate": 2e-3, "weight_decay": 0.1, "checkpoint_every": 2}


def played(marks: str) -> Played:
    """One response to each prompt, right where ``marks`` has a 1."""
    own: dict[str, Any] = {
        "variant": "x",
        "sample": 0,
        "reward_parts": {},
        "response": "",
        "prompt": "",
        "new_tokens": 1,
    }
    rows = [
        Outcome(mode="greedy", prompt_id=str(i), success=mark == "1", reward=float(mark), **own)
        for i, mark in enumerate(marks)
    ]
    return Played(sampled=rows, greedy=rows)


def settings(base: Path, **changes: Any) -> RunConfig:
    sections: dict[str, Any] = {"base": {"model": str(base)}, "seed": 3, "actions": {}, "clone": {}, "finetune": TUNE}
    return RunConfig(**sections | {"improve": {"token_baseline": True}} | changes)


def trained(config: RunConfig, stage: str, source: Path, folder: Path) -> tuple[Path, list[TokenBatch]]:
    """(a stage's result, the batches that it was trained on)."""
    assert isinstance(config.finetune, Finetune)
    seen: list[TokenBatch] = []
    own = offline_work.streams

    def watched(*arguments: Any) -> tuple[Iterator[TokenBatch], list[Any]]:
        batches, held = own(*arguments)
        return (seen.append(batch) or batch for batch in batches), held  # type: ignore[func-returns-value]

    job = OfflineJob(
        stage=stage,
        config=config,
        settings=config.finetune,
        source=str(source),
        base=config.base.model,
        checkpoints=str(folder / "checkpoints"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offline_work, "streams", watched)
        offline_work.work(job, lambda *_: None)
    record = folder / "stages" / f"{stage}.json"
    record.parent.mkdir(exist_ok=True)
    record.write_text(json.dumps({"checkpoint": f"checkpoints/{stage}", "seconds": 1.0, "metrics": {}}))
    return job.result, seen


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).state_dict())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> int:
    """How many tensors are the same in both."""
    assert a.keys() == b.keys()
    return sum(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def run(tiny_base: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run folder in which the base LM was tuned both ways, from one clone."""
    folder, config = tmp_path_factory.mktemp("runs") / "tuned", settings(tiny_base)
    found = {stage: trained(config, stage, tiny_checkpoint, folder) for stage in ("token_sft", "finetune")}
    return {"folder": folder, "config": config} | found


def test_the_token_level_starts_from_its_own_sft_and_not_from_the_base_lm_that_fta_changed(
    run: dict[str, Any], tiny_base: Path
) -> None:
    config, sources = run["config"], sources_of(run["config"], run["folder"])
    start = starting_point(config, config.improve, sources["token_level"], "token").host
    assert start.level == "token" and start.token_blocks == 1  # the policy's blocks, as before
    found, tuned, first = (weights(path) for path in (start.checkpoint, base_path(run["finetune"][0]), tiny_base))
    assert same(found, weights(run["token_sft"][0] / "base")) == len(found)
    assert same(found, tuned) == same(found, first) == 0
    assert sources["improve"] == run["finetune"][0] and load_tokenizer(start.checkpoint).vocab_size > 0


def test_both_sides_are_tuned_on_the_same_tokens_in_the_same_order(run: dict[str, Any]) -> None:
    (_, sft), (_, fta) = run["token_sft"], run["finetune"]
    assert len(sft) == len(fta) == 4  # updates
    for one, other in zip(sft, fta, strict=True):
        assert len(one.input_ids) == 6  # batch size
        assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.response_mask, other.response_mask)
    assert sum(int(b.response_mask.sum()) for b in sft) == sum(int(b.response_mask.sum()) for b in fta) > 4 * 6


def test_its_sft_is_next_token_training_as_by_hand(run: dict[str, Any], tiny_base: Path) -> None:
    """transformers' model, torch's AdamW and a cross-entropy over the response tokens, nothing of ours but the data."""
    config = run["config"]
    lm = AutoModelForCausalLM.from_pretrained(tiny_base, trust_remote_code=False)
    decayed = [p for p in lm.parameters() if p.ndim > 1]
    groups = [{"params": decayed}, {"params": [p for p in lm.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1)
    data = {"task": build_task(config.task), "tokenizer": load_tokenizer(tiny_base), "chat": False, "seed": 3}
    batches = training_batches(config.finetune.data, batch_size=6, max_length=32, **data)
    for update in range(4):
        batch = next(batches)
        targets = batch.input_ids.masked_fill(~batch.response_mask, -100)[:, 1:]
        logits = lm(batch.input_ids).logits[:, :-1]
        cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100).backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * learning_rate_share(config.finetune, update)
        optimizer.step()
        optimizer.zero_grad()
    found = weights(run["token_sft"][0] / "base")
    for name, tensor in lm.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4)


def test_its_sft_goes_on_from_its_checkpoint(run: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path) -> None:
    half = settings(Path(run["config"].base.model), finetune=TUNE | {"updates": 4, "checkpoint_every": 3})
    work, count = tmp_path / "broken", iter(range(99))

    class Killed(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:
        own = offline_work.save_state

        def killed(*arguments: Any, **named: Any) -> None:
            own(*arguments, **named)
            if next(count) == 0:
                raise Killed

        patch.setattr(offline_work, "save_state", killed)
        with pytest.raises(Killed):
            trained(half, "token_sft", tiny_checkpoint, work)
    result, seen = trained(half, "token_sft", tiny_checkpoint, work)
    assert len(seen) == 1, "three updates were done"
    found = weights(result / "base")
    assert same(found, weights(run["token_sft"][0] / "base")) == len(found)


def test_the_evaluation_lists_it_as_a_base_lm_beside_the_token_level(run: dict[str, Any], tiny_base: Path) -> None:
    hosts = variants(run["config"], {name: run[name][0] for name in ("token_sft", "finetune")})
    assert hosts["token_sft"].level == "base" and hosts["finetuned"].level == "latent"
    assert Path(hosts["token_sft"].checkpoint) == run["token_sft"][0] / "base"
    assert made_variants(run["config"]) == ("base", "cloned", "finetuned", "improved", "token_sft", "token_level")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, ["actions", "clone", "token_sft", "finetune", "token_level", "improve"]),
        ({"improve": {"level": "token"}}, ["actions", "clone", "token_sft", "finetune", "improve"]),
        ({"improve": {}}, ["actions", "clone", "finetune", "improve"]),
        ({"finetune": None}, ["actions", "clone", "token_level", "improve"]),
        ({"improve": None}, ["actions", "clone", "finetune"]),
    ],
)
def test_it_is_there_only_beside_fine_tuning_and_a_token_level(
    tmp_path: Path, changes: dict[str, Any], found: list[str]
) -> None:
    config = settings(tmp_path, **changes)
    assert [stage.name for stage in planned(config)] == [stage.name for stage in plan(config, tmp_path)] == found
    tuned = "token_sft" in found
    assert ("token_sft" in made_variants(config)) == tuned


def test_its_cost_counts_for_the_token_level_and_for_nobody_else() -> None:
    seconds = {"actions": 100.0, "clone": 20.0, "token_sft": 4.0, "finetune": 5.0, "token_level": 300.0, "improve": 7.0}
    stages = {name: {"seconds": s, "metrics": {"parameters_trained": s}} for name, s in seconds.items()}
    costs = {name: cost["cost_seconds"] for name, cost in variant_costs(stages, level="latent").items()}
    assert costs["token_sft"] == 4 and costs["token_level"] == 304 and costs["finetuned"] == 125
    assert costs["improved"] == 132 and costs["base"] == 0
    at_token_level = {name: stages[name] for name in ("actions", "clone", "token_sft", "finetune", "improve")}
    assert variant_costs(at_token_level, level="token")["improved"]["cost_seconds"] == 11
    assert "token_sft" not in behind("improved")


def test_a_run_of_a_version_before_stays_as_it_is(tmp_path: Path, tiny_base: Path, tiny_checkpoint: Path) -> None:
    """Its token level was trained on what FTA-P left: nothing is trained under it afterwards, it is finished."""
    config, names = settings(tiny_base, evaluation=None), ["actions", "clone", "finetune", "token_level", "improve"]
    assert finished(config, {"stages": {name: {} for name in names}})
    assert not finished(config, {"stages": {name: {} for name in names[:3]}}), "its token level is still to come"
    (tmp_path / "stages").mkdir()
    for name in names[:3]:
        (tmp_path / "stages" / f"{name}.json").write_text(json.dumps({"checkpoint": f"checkpoints/{name}"}))
    assert "token_sft" in [stage.name for stage in plan(config, tmp_path)]
    (tmp_path / "checkpoints" / "token_level-00000050").mkdir(parents=True)
    assert [stage.name for stage in plan(config, tmp_path)] == names
    assert sources_of(config, tmp_path)["token_level"].name == "finetune"


def test_what_is_compared_with_it() -> None:
    marks = {"base": "0000", "cloned": "1000", "finetuned": "1110", "improved": "1111"}
    marks |= {"token_sft": "1100", "token_level": "0111"}
    found = differences({name: played(text) for name, text in marks.items()}, 1, {}, 0)
    means = {pair: passes["greedy"]["mean"] for pair, passes in found.items()}
    assert means == {
        "cloned - base": 0.25,
        "finetuned - base": 0.75,
        "finetuned - cloned": 0.5,
        "token_sft - base": 0.5,
        "token_level - base": 0.75,
        "token_level - token_sft": 0.25,
        "finetuned - token_sft": 0.25,
        "improved - base": 1.0,
        "improved - cloned": 0.75,
        "improved - finetuned": 0.25,
        "improved - token_sft": 0.5,
        "improved - token_level": 0.25,
    }


def test_a_base_lm_that_another_run_tuned_is_warned_of(
    run: dict[str, Any], tiny_base: Path, tiny_checkpoint: Path
) -> None:
    def warned(init: Path, **changes: Any) -> list[str]:
        return tuned_start(settings(tiny_base, actions={"init": str(init), "updates": 0}, **changes))

    tuned = run["finetune"][0]
    (said,) = warned(tuned, finetune=None)
    assert said.startswith("actions.init: ") and str(tuned) in said and "clone" in said
    assert warned(tuned, improve={"level": "token"}) and not warned(tuned, improve={})
    assert not warned(tiny_checkpoint) and not warned(tiny_base.parent / "nothing")


def test_a_comparison_names_what_its_sides_differ_in(run: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    def side(variant: str, folder: Path, temperature: float = 1.0) -> list[Finished]:
        config = settings(tiny_base, rollout={"temperature": temperature})
        return [Finished(folder=folder, config=config, variant=variant, answers=None, costs={}, curve=[])]

    assert not unlike(side("improved", run["folder"]), side("token_level", run["folder"]))
    (said,) = unlike(side("improved", tmp_path), side("improved", tmp_path, 0.6))
    assert "temperature 1, B at 0.6" in said
    (said,) = unlike(side("improved", tmp_path), side("token_level", tmp_path))
    assert str(tmp_path) in said and "run its config again" in said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_with_both_lists_the_token_levels_own_start(tmp_path: Path) -> None:
    small = ["actions.updates=6", "clone.updates=4", "improve.updates=2", "improve.prompts_per_update=4"]
    small += ["finetune={updates: 3, batch_size: 8}", "improve.token_baseline=true", "improve.group_size=4"]
    small += ["evaluation.prompts=16", "evaluation.marginal_sequences=4", "actions.min_alive_share=0"]
    call("run", QUICKSTART, *small, "explorer.enabled=false", "--run-dir", str(tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["stages"])[2:] == ["token_sft", "finetune", "token_level", "improve"]
    found = summary["evaluation"]
    assert {"sampled", "greedy", "nll", "cost_seconds"} <= found["token_sft"].keys()
    assert {"token_level - token_sft", "token_sft - base", "improved - token_level"} <= found["differences"].keys()
    info = json.loads((tmp_path / "run" / "checkpoints" / "token_level" / "token_policy.json").read_text())
    assert info["base"] == "../token_sft/base", "within the run, so that the run can be moved"
    assert "token_sft" in (tmp_path / "run" / "report.html").read_text()
