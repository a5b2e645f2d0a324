"""NLL and KL on text: against whole-sequence formulas, and what must be zero is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from configs.schema import RunConfig
from latent_control import LatentActionLM
from latent_control.analysis.likelihood import latent_speaker, text_measures, token_speaker
from latent_control.analysis.measures import marginal_measures
from latent_control.decoding.action_decoder import base_actor
from latent_control.records import TokenBatch
from latent_control.token_policy import token_actor, token_policy
from pipeline.stages.text_likelihood import measure
from rollout_workers.rollouts import HostSpec

pytest_plugins = ("rl_fixtures",)


@pytest.fixture
def batches() -> list[TokenBatch]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for rows, length in ((2, 9), (3, 6)):
        ids = torch.randint(3, 48, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        found.append(
            TokenBatch(input_ids=ids, attention_mask=mask, response_mask=mask.bool() & (torch.arange(length) >= 3))
        )
    return found


def test_the_base_against_itself(model: LatentActionLM, batches: list[TokenBatch]) -> None:
    base = token_speaker(model.base, base_actor(model.base))
    found = text_measures(base, base, batches)
    total, count = 0.0, 0
    for batch in batches:
        log_probs = torch.log_softmax(model.base.lm(batch.input_ids).logits, -1)[:, :-1]
        picked = log_probs.gather(-1, batch.input_ids[:, 1:, None])[..., 0][batch.response_mask[:, 1:]]
        total, count = total - float(picked.sum()), count + len(picked)
    assert found["nll"] == pytest.approx(total / count, rel=1e-5)
    assert (found["nll"], found["kl"]) == (found["nll_reference"], 0.0)


def test_the_marginal_equals_the_offline_stages_measure(model: LatentActionLM, batches: list[TokenBatch]) -> None:
    base = token_speaker(model.base, base_actor(model.base))
    found, known = text_measures(latent_speaker(model), base, batches), marginal_measures(model, batches)
    wanted = (known["nll_marginal"], known["nll_base_same"], known["kl_base_marginal"])
    assert (found["nll"], found["nll_reference"], found["kl"]) == pytest.approx(wanted, rel=1e-4)
    assert found["kl"] > 0.01


@pytest.mark.parametrize("trains", ["last_blocks", "steering", "added_blocks", "mlp", "all"])
def test_an_untrained_token_policy_is_the_base(
    trains: str, make_base: Callable[..., torch.nn.Module], batches: list[TokenBatch]
) -> None:
    own, policy = token_policy(make_base(), trains, 1)  # type: ignore[arg-type]
    reference, _ = token_policy(make_base(), "all", 0)
    base = token_speaker(reference, base_actor(reference))
    found = text_measures(token_speaker(own, token_actor(own, policy)), base, batches)
    assert found["kl"] == pytest.approx(0.0, abs=1e-6)
    assert found["nll"] == pytest.approx(found["nll_reference"], abs=1e-6)


def test_every_variant_of_a_run(tiny_base: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A fine-tuned base shows as a rise of the base's own NLL; an unchanged one as none."""
    model = LatentActionLM.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        for parameter in model.base.lm.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    tuned = model.save_pretrained(tmp_path / "tuned", bundle_base=True, inverse_dynamics=False)
    hosts = {
        "base": HostSpec(level="base", checkpoint=str(tiny_base)),
        "cloned": HostSpec(level="latent", checkpoint=str(tiny_checkpoint)),
        "finetuned": HostSpec(level="latent", checkpoint=str(tuned)),
        "token_level": HostSpec(level="token", checkpoint=str(tiny_base), token_blocks=1),
    }
    config = RunConfig(
        base={"model": str(tiny_base)}, evaluation={"marginal_sequences": 8}, cluster={"learner_threads": 1}
    )
    found = measure(config, hosts)
    assert found["base"]["nll_rise"] == found["base"]["kl_to_base"] == 0.0
    assert found["cloned"]["base_nll"] == pytest.approx(found["base"]["nll"], rel=1e-6)
    assert found["cloned"]["base_nll_rise"] == pytest.approx(0.0, abs=1e-6)
    assert found["cloned"]["kl_to_base"] > 0.01
    assert 1 <= found["cloned"]["inverse_dynamics_code_perplexity"] <= 8
    assert 0 <= found["cloned"]["coverage"] <= 1
    assert abs(found["finetuned"]["base_nll_rise"]) > 0.001
    assert "coverage" not in found["finetuned"], "exported without its inverse dynamics model"
    assert found["token_level"] == pytest.approx(
        {"nll": found["base"]["nll"], "nll_rise": 0.0, "kl_to_base": 0.0}, abs=1e-5
    )


def test_text_files_stand_in_for_demonstrations(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(f"{i} + 1 = {i + 1}" for i in range(40)))
    retention = {"kind": "text", "path": str(tmp_path / "a.txt")}
    config = RunConfig(base={"model": str(tiny_base)}, evaluation={"marginal_sequences": 8, "retention": retention})
    hosts = {"base": HostSpec(level="base", checkpoint=str(tiny_base))}
    text = measure(config, hosts)["base"]["nll"]
    task = measure(
        config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"retention": None})}), hosts
    )["base"]["nll"]  # type: ignore[union-attr]
    assert text > 0
    assert text != pytest.approx(task)
