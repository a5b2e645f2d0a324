"""The model as transformers sees it: same decoding, same text, exact marginal, nothing ignored in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from latent_control import LatentActionForCausalLM, LatentActionLM

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture(scope="module")
def exported(model: LatentActionLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    LatentActionForCausalLM.of(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def auto(exported: Path) -> LatentActionForCausalLM:
    return AutoModelForCausalLM.from_pretrained(exported)


def test_the_auto_classes_load_it_without_the_inverse_dynamics_model(auto: LatentActionForCausalLM, exported: Path) -> None:
    assert type(auto) is LatentActionForCausalLM
    assert auto.latent.inverse_dynamics is None
    assert AutoConfig.from_pretrained(exported).num_actions == 8
    assert not [path for path in exported.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_greedy_is_the_engines(auto: LatentActionForCausalLM, model: LatentActionLM) -> None:
    found = auto.generate(IDS, max_new_tokens=6, return_dict_in_generate=True)
    engine = model.generate(IDS, max_new_tokens=6, temperature=0)
    longest = int(engine.lengths.max())
    assert torch.equal(found.sequences, torch.cat([IDS, engine.tokens[:, :longest]], 1))
    assert torch.equal(found.codes, engine.actions[:, :longest])


def test_sampling_settings_reach_the_engine(auto: LatentActionForCausalLM, model: LatentActionLM) -> None:
    found = auto.generate(IDS, max_length=9, do_sample=True, temperature=0.7, top_k=3, num_return_sequences=2, eos_token_id=[], seed=4)
    engine = model.generate(IDS, max_new_tokens=5, temperature=0.7, top_k=3, repeats=2, stop_token=-1, seed=4)
    assert torch.equal(found[:, 4:], engine.tokens)
    assert torch.equal(found[:, :4], IDS.repeat_interleave(2, 0))


def test_end_token_and_padding_are_the_callers(auto: LatentActionForCausalLM) -> None:
    first = auto.generate(IDS, max_new_tokens=6, eos_token_id=[])
    end = int(first[0, 5])  # the second new token of the first row ends it
    found = auto.generate(IDS, max_new_tokens=6, eos_token_id=end, pad_token_id=1)
    place = first[0, 4:].tolist().index(end) + 1
    assert found[0, 4 : 4 + place].tolist() == first[0, 4 : 4 + place].tolist()
    assert set(found[0, 4 + place :].tolist()) <= {1}


def test_codes_and_masks_steer(auto: LatentActionForCausalLM) -> None:
    found = auto.generate(IDS, max_new_tokens=5, eos_token_id=[], codes=torch.tensor([3, -1, 2]), return_dict_in_generate=True)
    assert found.codes[:, 0].tolist() == [3, 3] and found.codes[:, 2].tolist() == [2, 2]
    some = auto.generate(IDS, max_new_tokens=5, eos_token_id=[], allowed_codes=[1, 4], return_dict_in_generate=True)
    assert set(some.codes.flatten().tolist()) <= {1, 4}


@torch.no_grad()
def test_forward_is_the_marginal_over_codes(auto: LatentActionForCausalLM, model: LatentActionLM) -> None:
    found = auto(IDS, labels=torch.tensor([[-100, -100, 7, 8], [-100, -100, -100, 12]]))
    features = model.features(IDS)
    policy = torch.softmax(model.policy_logits(features)[1, 2], -1)
    world = torch.softmax(model.world_logits_of_all(features.read("final")[1, 2:3])[0], -1)  # [N, V]
    wanted = (policy[:, None] * world).sum(0)
    torch.testing.assert_close(found.logits[1, 2].exp(), wanted)
    picked = [found.logits[0, 1, 7], found.logits[0, 2, 8], found.logits[1, 2, 12]]
    assert float(found.loss) == pytest.approx(-float(sum(picked)) / 3, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "num_beams"),
        ({"do_sample": True, "top_p": 0.9}, "top_p"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"foo": 1}, "foo"),
        ({"max_new_tokens": None, "max_length": 4}, "max_length=4"),
        ({"allowed_codes": [8]}, r"allowed_codes names \[8\]"),
        ({"codes": torch.tensor([9])}, "holds 9"),
    ],
)
def test_what_would_be_ignored_is_refused(auto: LatentActionForCausalLM, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        auto.generate(IDS, **{"max_new_tokens": 3} | settings)


def test_spans_have_no_next_token_distribution_without_a_code(make_model: Any) -> None:
    spanned = LatentActionForCausalLM.of(make_model(span=2))
    assert spanned.generate(IDS, max_new_tokens=4, eos_token_id=[]).shape == (2, 8)
    with pytest.raises(ValueError, match="2 tokens"):
        spanned(IDS)


def test_a_config_alone_makes_no_model() -> None:
    from latent_control.auto import LatentActionAutoConfig

    with pytest.raises(ValueError, match="from_pretrained"):
        AutoModelForCausalLM.from_config(LatentActionAutoConfig())
