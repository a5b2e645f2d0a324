"""The model as ``transformers`` sees it: loading by the auto classes, and ``generate`` with the usual arguments."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, StoppingCriteria, pipeline

from latent_control import LatentActionForCausalLM, LatentActionLM, LatentGenerateOutput

PROMPTS = torch.tensor([[0, 0, 1, 5, 9], [1, 7, 8, 9, 11]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.fixture(scope="module")
def folder(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("auto") / "saved"
    LatentActionForCausalLM.wrap(make_model()).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def auto(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def test_the_auto_classes_load_it_without_code_from_the_folder(folder: Path, auto: Any, model: LatentActionLM) -> None:
    assert type(auto) is LatentActionForCausalLM
    assert type(AutoConfig.from_pretrained(folder)).__name__ == "LatentControlConfig"
    assert auto.config.vocab_size == 48
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    assert not [name for name in auto.latent.new_modules() if name.startswith("inverse_dynamics")]
    saved = json.loads((folder / "config.json").read_text())
    assert saved["latent_actions"]["num_actions"] == 8
    assert "_name_or_path" not in saved["base_lm"]
    assert all(
        torch.equal(tensor, auto.latent.new_modules()[name])
        for name, tensor in model.new_modules().items()
        if "inverse" not in name
    )


def test_greedy_is_exactly_the_engines(auto: Any, model: LatentActionLM) -> None:
    wanted = model.generate(PROMPTS, MASK, max_new_tokens=8, temperature=0.0)
    out = auto.generate(input_ids=PROMPTS, attention_mask=MASK, max_new_tokens=8, return_codes=True)
    assert isinstance(out, LatentGenerateOutput)
    longest = int(wanted.lengths.max())
    assert torch.equal(out.sequences, torch.cat([PROMPTS, wanted.tokens[:, :longest]], 1))
    assert torch.equal(out.codes, wanted.actions[:, :longest])
    assert torch.equal(auto.generate(PROMPTS, attention_mask=MASK, max_new_tokens=8), out.sequences)


def test_sampling_is_of_codes(auto: Any, model: LatentActionLM) -> None:
    wanted = model.generate(PROMPTS, MASK, max_new_tokens=6, temperature=0.7, top_k=3, seed=5, repeats=2, stop_token=-1)
    asked = {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 3,
        "seed": 5,
        "num_return_sequences": 2,
        "eos_token_id": -1,
    }
    out = auto.generate(PROMPTS, attention_mask=MASK, max_new_tokens=6, return_dict_in_generate=True, **asked)
    assert torch.equal(out.sequences[:, 5:], wanted.tokens)
    assert torch.equal(out.code_logp, wanted.action_logp)


def test_codes_are_forced_and_allowed(auto: Any) -> None:
    out = auto.generate(
        PROMPTS,
        attention_mask=MASK,
        max_new_tokens=4,
        eos_token_id=-1,
        codes=[6, 1],
        allowed_codes=[1, 6],
        return_codes=True,
    )
    assert out.codes[:, :2].tolist() == [[6, 1]] * 2
    assert set(out.codes.unique().tolist()) <= {1, 6}
    with pytest.raises(ValueError, match="codes has 8"):
        auto.generate(PROMPTS, max_new_tokens=4, codes=[8])


def test_generation_ends_where_it_is_told_to(auto: Any) -> None:
    free = auto.generate(PROMPTS, attention_mask=MASK, max_new_tokens=6, eos_token_id=-1)[:, 5:]
    end = int(free[0, 2])
    stopped = auto.generate(
        PROMPTS, attention_mask=MASK, max_new_tokens=6, eos_token_id=[end], pad_token_id=47, return_codes=True
    )
    place = free[0].tolist().index(end) + 1
    assert stopped.lengths[0] == place
    assert set(stopped.sequences[0, 5 + place :].tolist()) <= {47}
    assert auto.generate(PROMPTS, attention_mask=MASK, max_length=8, eos_token_id=-1).shape == (2, 8)
    wanted = GenerationConfig(max_new_tokens=2, eos_token_id=-1)
    assert auto.generate(PROMPTS, wanted, attention_mask=MASK).shape == (2, 7)

    class Three(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.tensor([input_ids.shape[1] >= 8, False])

    out = auto.generate(
        PROMPTS, attention_mask=MASK, max_new_tokens=6, eos_token_id=-1, stopping_criteria=[Three()], return_codes=True
    )
    assert out.lengths.tolist() == [3, 6]
    assert torch.equal(out.sequences[1, 5:], free[1])


def test_a_streamer_sees_the_prompt_and_every_token(auto: Any) -> None:
    class Streamer:
        seen: list[int] = []  # noqa: RUF012
        ended = False

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    out = auto.generate(PROMPTS[1:], max_new_tokens=4, streamer=streamer)
    assert streamer.seen == out[0].tolist()
    assert streamer.ended
    with pytest.raises(ValueError, match="a streamer shows one sequence, not 2"):
        auto.generate(PROMPTS, max_new_tokens=4, streamer=streamer)


@pytest.mark.parametrize("argument", [{"num_beams": 4}, {"top_p": 0.9}, {"logits_processor": [1]}, {"max_tokens": 3}])
def test_what_would_be_ignored_is_refused(auto: Any, argument: dict[str, Any]) -> None:
    name, value = next(iter(argument.items()))
    with pytest.raises(ValueError, match=f"generate does not know {name}="):
        auto.generate(PROMPTS, **{"max_new_tokens": 4} | argument)
    assert auto.generate(PROMPTS, max_new_tokens=1, num_beams=1, top_p=1.0, use_cache=True).shape == (2, 6), value


def test_limits_are_asked_for(auto: Any) -> None:
    with pytest.raises(ValueError, match="generate needs max_new_tokens"):
        auto.generate(PROMPTS)
    with pytest.raises(ValueError, match="max_length=5 leaves no room after prompts of 5 tokens"):
        auto.generate(PROMPTS, max_length=5)


def test_forward_is_the_world_model(auto: Any, model: LatentActionLM) -> None:
    codes = torch.tensor([[0, 0, 3, 1, 2], [4, 5, 6, 7, 0]])
    features = model.features(PROMPTS, MASK)
    assert torch.equal(auto(PROMPTS, attention_mask=MASK, codes=codes).logits, model.world_logits(features, codes))
    out = auto(PROMPTS, attention_mask=MASK, codes=codes, labels=PROMPTS.masked_fill(MASK == 0, -100))
    logp = out.logits.log_softmax(-1)
    wanted = [logp[b, t, PROMPTS[b, t + 1]] for b, t in ((0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3))]
    assert MASK[0, 1] == 0  # whose successor is a label all the same
    wanted.append(logp[0, 1, PROMPTS[0, 2]])
    torch.testing.assert_close(out.loss, -torch.stack(wanted).mean())


def test_the_base_may_stay_where_it_is(make_base: Any, make_model: Any, tmp_path: Path) -> None:
    make_base().save_pretrained(tmp_path / "base")
    model = make_model(base=tmp_path / "base")
    LatentActionForCausalLM.wrap(model).save_pretrained(tmp_path / "saved", bundle_base=False)
    assert not (tmp_path / "saved" / "base").exists()
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").generate(PROMPTS, max_new_tokens=4)
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(
        ValueError,
        match=r"the base LM of .*saved lay at .*base, where it is no longer: say where it is now \(base=FOLDER",
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", base=tmp_path / "moved")
    assert torch.equal(again.generate(PROMPTS, max_new_tokens=4), wanted)
    other: PreTrainedModel = make_base(num_attention_heads=2)
    torch.nn.init.normal_(other.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="is not the one"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved", base=other)


def test_loading_says_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder on this machine; download the model"):
        LatentActionForCausalLM.from_pretrained("someone/model")
    with pytest.raises(ValueError, match="from_pretrained does not know quantization_config"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config={"load_in_8bit": True})
    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken" / "latent_actions.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="take another checkpoint"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "broken")


def test_bfloat16_bases_keep_a_policy_in_float32(folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert loaded.latent.codebook.dtype == torch.bfloat16
    assert next(loaded.latent.policy.parameters()).dtype == torch.float32
    assert loaded.generate(PROMPTS, max_new_tokens=3, eos_token_id=-1).shape == (2, 8)


def test_a_text_pipeline_takes_it(auto: Any) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({str(i): i for i in range(48)}, unk_token="0"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="0", eos_token="2", unk_token="0")
    said = pipeline("text-generation", model=auto, tokenizer=tokenizer)(
        "1 7 8", max_new_tokens=4, return_full_text=False
    )
    wanted = auto.generate(torch.tensor([[1, 7, 8]]), max_new_tokens=4)[0, 3:]
    assert said[0]["generated_text"].split() == [str(int(token)) for token in wanted if token not in (0, 2)]
    words = auto.generate(
        torch.tensor([[1, 7, 8]]),
        max_new_tokens=4,
        eos_token_id=-1,
        stop_strings=[str(int(wanted[1]))],
        tokenizer=tokenizer,
    )
    assert words.shape[1] <= 3 + wanted.tolist().index(int(wanted[1])) + 1


@torch.no_grad()
def test_forward_is_the_marginal_over_codes(auto: Any, model: LatentActionLM) -> None:
    ids = PROMPTS[1:].repeat(2, 1)
    found = auto(ids, labels=torch.tensor([[-100, -100, 7, 8, 9], [-100, -100, -100, 12, -100]]))
    features = model.features(ids)
    policy = torch.softmax(model.policy_logits(features)[1, 2], -1)
    world = torch.softmax(model.world_logits_of_all(features.read("final")[1, 2:3])[0], -1)  # [N, V]
    torch.testing.assert_close(found.logits[1, 2].exp(), (policy[:, None] * world).sum(0))
    picked = [found.logits[0, 1, 7], found.logits[0, 2, 8], found.logits[0, 3, 9], found.logits[1, 2, 12]]
    assert float(found.loss) == pytest.approx(-float(sum(picked)) / 4, rel=1e-5)


def test_spans_have_no_next_token_distribution_without_codes(make_model: Any) -> None:
    spanned = LatentActionForCausalLM.wrap(make_model(span=2))
    with pytest.raises(ValueError, match="2 tokens"):
        spanned(PROMPTS)
    assert spanned(PROMPTS, codes=torch.zeros_like(PROMPTS)).logits.shape == (2, 5, 48)
