"""The offline stages: what each changes, schedules, microbatches, resume, the codebook's guard, several workers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from rl_tools import NUM_ACTIONS
from transformers import AutoTokenizer

from configs.schema import Actions, Clone, Finetune, RunConfig, TaskConfig, Training
from latent_control import LatentActionLM
from latent_control.records import TokenBatch
from learners.actions import ActionsStage, gumbel_temperature
from learners.clone import CloneStage
from learners.finetune import FinetuneStage
from learners.learning_rate import learning_rate_share
from learners.offline_training import OfflineStage, TrainingStep, make_optimizer, one_update
from pipeline.data.batches import training_batches
from pipeline.stages.offline_job import OfflineJob
from pipeline.stages.offline_measures import guard_codebook
from pipeline.stages.offline_work import new_model, work
from pipeline.stages.ray_train import run_workers
from rollout_workers.tasks import build_task

pytest_plugins = ("rl_fixtures",)

SMALL: dict[str, Any] = {
    "updates": 3,
    "batch_size": 8,
    "max_length": 32,
    "warmup_updates": 0,
    "evaluation_sequences": 8,
}
SHAPE: dict[str, Any] = {
    "num_actions": NUM_ACTIONS,
    "inverse_dynamics_layers": 1,
    "merge_layers": 1,
    "policy_layers": 1,
}


def actions(**changes: Any) -> Actions:
    return Actions(**SMALL | SHAPE | {"min_alive_share": 0.0} | changes)


def clone(**changes: Any) -> Clone:
    return Clone(**SMALL | changes)


def finetune(**changes: Any) -> Finetune:
    return Finetune(**SMALL | {"learning_rate": 1e-3} | changes)


@pytest.fixture
def make_job(tiny_base: Path, tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., OfflineJob]:
    """``make_job(stage, settings, name)``: a stage that starts from ``tiny_checkpoint`` (``actions``: anew)."""

    def make(stage: str, settings: Training, name: str = "run") -> OfflineJob:
        config = RunConfig(base={"model": str(tiny_base)}, seed=3, evaluation={"marginal_sequences": 4})
        source = None if stage == "actions" else str(tiny_checkpoint)
        return OfflineJob(
            stage=stage,
            config=config,
            settings=settings,
            source=source,
            base=str(tiny_base),
            checkpoints=str(tmp_path / name / "checkpoints"),
        )

    return make


Jobs = Callable[..., OfflineJob]


def done(job: OfflineJob) -> list[dict[str, float]]:
    """Run a job; its metrics per update."""
    logged: list[dict[str, float]] = []
    work(job, lambda update, metrics: logged.append({"update": update, **metrics}))
    return logged


def changes(job: OfflineJob, before: LatentActionLM) -> tuple[set[str], set[str]]:
    """(tensors the result changed, tensors it kept)."""
    after = LatentActionLM.from_pretrained(job.result).state_dict()
    old = before.state_dict()
    assert old.keys() == after.keys()
    changed = {name for name in old if not torch.equal(old[name], after[name])}
    return changed, old.keys() - changed


def parts(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


# -- schedules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("update", "rate"),
    [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (60, 0.55), (35, 0.1 + 0.9 * 0.8535533905932737), (110, 0.1), (500, 0.1)],
)
def test_learning_rate_warms_up_and_falls_to_its_floor(update: int, rate: float) -> None:
    settings = Training(updates=110, warmup_updates=10, min_learning_rate_share=0.1)
    assert learning_rate_share(settings, update) == pytest.approx(rate)


def test_learning_rate_without_warm_up_starts_at_the_top() -> None:
    settings = Training(updates=10, warmup_updates=0, min_learning_rate_share=0.0)
    assert [learning_rate_share(settings, update) for update in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize(("update", "tau"), [(0, 2.0), (10, 1.0), (20, 0.5), (99, 0.5)])
def test_gumbel_temperature_falls_geometrically(update: int, tau: float) -> None:
    settings = Actions(updates=100, temperature=2.0, final_temperature=0.5, anneal_share=0.2)
    assert gumbel_temperature(settings, update) == pytest.approx(tau)


def test_no_weight_decay_on_codebook_and_vectors(tiny_checkpoint: Path) -> None:
    model = LatentActionLM.from_pretrained(tiny_checkpoint)
    optimizer = make_optimizer(ActionsStage(model, actions()), actions(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if id(parameter) in decay:
            assert decay[id(parameter)] == (0.0 if name == "codebook" or "norm" in name else 0.1), name


# -- invariant 6: what changes -----------------------------------------------------------------------------------------


def test_actions_changes_inverse_dynamics_codebook_and_merge(make_job: Jobs) -> None:
    job = make_job("actions", actions())
    logged = done(job)
    changed, kept = changes(job, new_model(job.settings, job.base, job.config, "auto"))
    assert parts(changed) == {"inverse_dynamics", "codebook", "merge"}
    assert parts(kept) == {"base", "policy"}
    assert [record["update"] for record in logged] == [1, 2, 3]
    assert {
        "nll_codes",
        "nll_base",
        "inverse_dynamics_alive_codes",
        "inverse_dynamics_code_perplexity",
        "code_entropy",
        "coverage",
        "distinct_tokens",
    } <= logged[-1].keys()


def test_clone_changes_the_policy(make_job: Jobs, tiny_checkpoint: Path) -> None:
    job = make_job("clone", clone())
    logged = done(job)
    changed, kept = changes(job, LatentActionLM.from_pretrained(tiny_checkpoint))
    assert parts(changed) == {"policy"} and parts(kept) == {"base", "codebook", "inverse_dynamics", "merge"}
    assert {"nll_marginal", "nll_base_same", "kl_base_marginal"} <= logged[-1].keys()


@pytest.mark.parametrize("train_merge", [False, True])
@pytest.mark.parametrize("codes", ["policy", "inverse_dynamics"])
def test_finetune_changes_the_base_and_where_asked_the_merge(
    make_job: Jobs, tiny_checkpoint: Path, train_merge: bool, codes: str
) -> None:
    job = make_job("finetune", finetune(train_merge=train_merge, codes=codes))
    done(job)
    changed, kept = changes(job, LatentActionLM.from_pretrained(tiny_checkpoint))
    assert parts(changed) == {"base"} | ({"merge"} if train_merge else set())
    assert parts(kept) == {"codebook", "inverse_dynamics", "policy"} | (set() if train_merge else {"merge"})
    assert AutoTokenizer.from_pretrained(job.result / "base").eos_token == "</s>", (
        "the tuned base is whole, tokenizer included"
    )


def test_the_gradient_of_fta_p_reaches_the_whole_base(tiny_checkpoint: Path) -> None:
    """The published code's FTA-P reaches it through one term only; head and embeddings alone would be that."""
    stage = FinetuneStage(LatentActionLM.from_pretrained(tiny_checkpoint), finetune())
    found = gradients(stage, finetune())
    assert all(float(g.abs().max()) > 0 for name, g in found.items() if "layers" in name and "merge" not in name)
    assert any("layers.0" in name for name in found)


def test_no_updates_pass_the_model_on(make_job: Jobs, tiny_checkpoint: Path) -> None:
    job = make_job("clone", clone(updates=0))
    assert done(job) == []
    assert changes(job, LatentActionLM.from_pretrained(tiny_checkpoint))[0] == set()


# -- one update --------------------------------------------------------------------------------------------------------


def batch_of(model: LatentActionLM, rows: int = 8) -> TokenBatch:
    """Demonstrations, cut to several lengths."""
    task, tokenizer = TaskConfig(), AutoTokenizer.from_pretrained(model.base_source)
    reading: dict[str, Any] = {
        "task": build_task(task),
        "tokenizer": tokenizer,
        "chat": False,
        "max_length": 32,
        "seed": 0,
    }
    batch = next(training_batches(Training().data, batch_size=rows, **reading))
    longest = batch.input_ids.shape[1]
    real = torch.arange(longest) < longest - torch.arange(rows)[:, None] % 5
    return TokenBatch(
        input_ids=batch.input_ids * real, attention_mask=real.long(), response_mask=batch.response_mask & real
    )


def gradients(stage: OfflineStage, settings: Training, batch: TokenBatch | None = None) -> dict[str, torch.Tensor]:
    """The gradient of one update: what plain descent at rate 1 takes off the tensors."""
    make_optimizer(stage, settings)  # marks what is trained
    trained = {name: p for name, p in stage.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    one_update(
        stage,
        stage,
        batch_of(stage.model) if batch is None else batch,
        settings=settings,
        accelerator=Accelerator(cpu=True),
        optimizer=torch.optim.SGD(trained.values(), lr=1.0),
        seed=0,
        update=0,
    )
    return {name: before[name] - p.detach() for name, p in trained.items()}


def by_hand(model: LatentActionLM, batch: TokenBatch, kind: str) -> float:
    """A stage's loss from the method's own arrows, position by position: a_t is taken at t and explains x_{t+1}."""
    terms = []
    for ids, mask, response in zip(batch.input_ids, batch.attention_mask, batch.response_mask, strict=True):
        row = ids[None, : int(mask.sum())]
        features, labels = model.features(row), model.label_actions(row)
        policy = torch.log_softmax(model.policy_logits(features), -1)[0]
        codes = policy.argmax(-1)[None] if kind == "fta_p" else torch.cat([labels, labels[:, -1:]], 1)
        world = torch.log_softmax(model.world_logits(features, codes), -1)[0]
        for t in range(row.shape[1] - 1):
            if response[t + 1]:
                terms.append(-policy[t, labels[0, t]] if kind == "clone" else -world[t, row[0, t + 1]])
    return float(torch.stack(terms).mean())


@pytest.mark.parametrize("kind", ["clone", "fta_p", "fta_i", "actions"])
def test_losses_pair_each_token_with_the_code_that_produced_it(tiny_checkpoint: Path, kind: str) -> None:
    model = LatentActionLM.from_pretrained(tiny_checkpoint)
    # So cold and so sure that Gumbel noise decides nothing: the sampled code is the label.
    model.inverse_dynamics.head.weight.data *= 1e4
    stages: dict[str, OfflineStage] = {
        "clone": CloneStage(model, clone(targets="hard")),
        "fta_p": FinetuneStage(model, finetune(codes="policy")),
        "fta_i": FinetuneStage(model, finetune(codes="inverse_dynamics")),
        "actions": ActionsStage(model, actions(usage_weight=0.0, temperature=0.5)),
    }
    batch = batch_of(model)
    positions = float(batch.response_mask[:, 1:].sum())
    step = TrainingStep(
        update=0, updates=1, positions=positions, generator=torch.Generator().manual_seed(0), context=None
    )
    with torch.no_grad():
        loss, _ = stages[kind](batch, step)
        assert float(loss) == pytest.approx(by_hand(model, batch, kind), rel=1e-4)


@pytest.mark.parametrize("kind", ["actions", "clone_soft", "clone_hard", "finetune"])
@pytest.mark.parametrize("size", [1, 3])
def test_microbatches_give_the_gradient_of_the_batch(tiny_checkpoint: Path, kind: str, size: int) -> None:
    free = {"gradient_clip": 1e9}
    model = LatentActionLM.from_pretrained(tiny_checkpoint)
    stages: dict[str, tuple[Any, Any]] = {
        "actions": (ActionsStage, actions(usage_weight=0.5, entropy_weight=0.1, **free)),
        "clone_soft": (CloneStage, clone(targets="soft", **free)),
        "clone_hard": (CloneStage, clone(targets="hard", **free)),
        "finetune": (FinetuneStage, finetune(train_merge=True, **free)),
    }
    make, settings = stages[kind]
    batch = batch_of(model)
    whole = gradients(make(copy.deepcopy(model), settings), settings, batch)
    cut = settings.model_copy(update={"microbatch_size": size})
    pieces = gradients(make(copy.deepcopy(model), cut), cut, batch)
    largest = max(float(g.abs().max()) for g in whole.values())
    assert largest > 1e-3
    for name, value in whole.items():
        assert float((pieces[name] - value).abs().max()) < 1e-5 * max(1.0, largest), name


def test_a_loss_that_is_not_finite_stops_and_changes_nothing(tiny_checkpoint: Path) -> None:
    model = LatentActionLM.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        model.policy.head.weight[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match="the loss of update 0 is nan"):
        gradients(CloneStage(model, clone()), clone())
    assert all(torch.equal(before[name], t) or name == "policy.head.weight" for name, t in model.state_dict().items())


def test_cloning_lowers_its_loss(make_job: Jobs) -> None:
    logged = done(make_job("clone", clone(updates=30, learning_rate=1e-2, batch_size=16)))
    assert logged[-1]["loss"] < 0.7 * logged[0]["loss"] and logged[-1]["agreement"] > logged[0]["agreement"]


# -- resume ------------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize(("stage", "settings"), [("actions", actions), ("clone", clone), ("finetune", finetune)])
def test_resumed_training_is_the_uninterrupted_one_bit_for_bit(
    make_job: Jobs, stage: str, settings: Callable[..., Training]
) -> None:
    longer = settings(updates=6, checkpoint_every=2, weight_decay=0.01, microbatch_size=4)
    straight, broken = make_job(stage, longer, "straight"), make_job(stage, longer, "broken")
    whole = done(straight)

    def interrupt(update: int, metrics: dict[str, float]) -> None:
        if update == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        work(broken, interrupt)
    rest = done(broken)
    assert [record["update"] for record in rest] == [3, 4, 5, 6]
    assert [record["loss"] for record in rest] == [record["loss"] for record in whole[2:]]
    # Model and optimiser in the middle, and the result.
    for name in (f"{stage}-00000004/state", f"{stage}/latent_actions"):
        first, second = (Path(job.checkpoints) / f"{name}.safetensors" for job in (straight, broken))
        assert first.read_bytes() == second.read_bytes(), name
    if stage == "finetune":
        first, second = (job.result / "base/model.safetensors" for job in (straight, broken))
        assert first.read_bytes() == second.read_bytes()


def test_a_damaged_state_is_passed_over(make_job: Jobs) -> None:
    longer = clone(updates=5, checkpoint_every=2)
    job = make_job("clone", longer)
    whole = done(job)
    state = Path(job.checkpoints) / "clone-00000004" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-7])
    assert [r["update"] for r in done(job)] == [3, 4, 5]
    assert done(make_job("clone", longer, "other"))[-1]["loss"] == whole[-1]["loss"]


# -- the codebook's guard ----------------------------------------------------------------------------------------------


def test_a_collapsed_codebook_stops_the_run_with_advice(make_job: Jobs) -> None:
    job = make_job(
        "actions", actions(updates=4, evaluate_every=2, anneal_share=0.5, min_alive_share=1.0, usage_weight=0.0)
    )
    wanted = (
        r"the codebook has collapsed: \d of 8 codes are active after 2 updates, where the data use \d+ different "
        r"tokens \(actions.min_alive_share is 1.0\)\. "
        r"Raise actions.usage_weight \(now 0.0\).*actions.temperature \(now 2.0\).*actions.num_actions"
    )
    with pytest.raises(ValueError, match=wanted):
        done(job)
    assert not job.result.exists()


@pytest.mark.parametrize(
    ("update", "share", "stops"), [(19, 0.0, False), (20, 0.24, True), (20, 0.25, False), (100, 0.1, True)]
)
def test_the_guard_waits_for_the_annealing(update: int, share: float, stops: bool) -> None:
    settings = Actions(updates=100, anneal_share=0.2, min_alive_share=0.25)
    found = {"inverse_dynamics_alive_codes": share * 64}
    if stops:
        with pytest.raises(ValueError, match=f"{share * 64:.0f} of 64 codes are active after {update} updates"):
            guard_codebook(settings, found, update, 99)
    else:
        guard_codebook(settings, found, update, 99)


# -- several workers ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ray_train_workers_train_as_one(make_job: Jobs, ray_session: None) -> None:
    """Cloning has no noise: halves of each batch on two workers give the gradient of the whole."""
    one, two = make_job("clone", clone(updates=4), "one"), make_job("clone", clone(updates=4, num_workers=2), "two")
    alone, together = done(one), []
    run_workers(two, lambda update, metrics: together.append({"update": update, **metrics}))
    assert [r["update"] for r in together] == [1, 2, 3, 4]
    assert [r["loss"] for r in together] == pytest.approx([r["loss"] for r in alone], rel=1e-4)
    assert together[-1]["nll_codes"] == pytest.approx(alone[-1]["nll_codes"], rel=1e-4)
    a, b = (LatentActionLM.from_pretrained(job.result).state_dict() for job in (one, two))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-3


@pytest.mark.slow
def test_two_workers_see_the_usage_of_the_whole_batch(make_job: Jobs, ray_session: None) -> None:
    """Their noise differs from one worker's, so only the run and its health are compared."""
    job = make_job("actions", actions(updates=3, num_workers=2, usage_weight=0.5), "two")
    logged: list[dict[str, float]] = []
    run_workers(job, lambda update, metrics: logged.append(metrics))
    assert len(logged) == 3 and all(torch.isfinite(torch.tensor(r["loss"])) for r in logged)
    assert job.result.is_dir()


@pytest.mark.slow
def test_a_collapsed_codebook_stops_several_workers_with_the_same_advice(make_job: Jobs, ray_session: None) -> None:
    job = make_job("actions", actions(updates=2, anneal_share=0.5, min_alive_share=1.0, num_workers=2), "two")
    with pytest.raises(ValueError, match=r"(?s)the codebook has collapsed.*Raise actions.usage_weight"):
        run_workers(job, lambda *_: None)


@pytest.mark.parametrize("kind", ["blocks", "mlp"])
def test_passes_read_each_batch_once_and_move_the_policy_as_if_it_were_read_again(
    make_job: Jobs, tiny_checkpoint: Path, tiny_base: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve updates in three passes: four batches through the base; without memory twelve, and the same weights."""
    source = tiny_checkpoint
    if kind == "mlp":
        shape = {"inverse_dynamics_layers": 1, "merge_layers": 1, "policy_kind": "mlp"}
        source = LatentActionLM.from_base(tiny_base, num_actions=8, seed=1, **shape).save_pretrained(
            tiny_base.parent / "mlp_to_clone"
        )
    stages: list[CloneStage] = []
    made = CloneStage.__init__
    monkeypatch.setattr(CloneStage, "__init__", lambda self, *args: (stages.append(self), made(self, *args))[1])
    weights = []
    for room in (64, 0):
        job = make_job("clone", clone(updates=12, passes=3, cache_megabytes=room), f"{kind}-{room}")
        job = replace(job, source=str(source))
        done(job)
        weights.append(LatentActionLM.from_pretrained(job.result).policy.state_dict())
    assert [stage.read for stage in stages] == [4, 12]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
