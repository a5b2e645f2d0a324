"""Base training: a tiny run learns, saves what from_pretrained loads, and is repeatable."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.schema import Architecture, BaseTraining, TaskConfig
from latent_control.model import LatentActionLM
from latent_control.text import load_tokenizer
from learners import base_training
from learners.base_training import encode_rows, new_model, train_base, word_tokenizer
from rollout_workers.tasks import Demonstration, build_task
from rollout_workers.tasks.countdown import Countdown
from rollout_workers.tasks.encoding import encode_demonstration

TINY = BaseTraining(
    architecture=Architecture(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2),
    updates=40,
    batch_size=32,
    max_length=64,
    learning_rate=1e-2,
    warmup_updates=5,
    evaluate_every=20,
    evaluation_sequences=32,
)
EMBEDDED = Path(__file__).parents[2] / "configs" / "models" / "countdown-1m"


def _train(folder: Path, config: BaseTraining = TINY) -> dict[int, Mapping[str, float]]:
    logged: dict[int, Mapping[str, float]] = {}
    train_base(
        config,
        task=Countdown(),
        folder=folder,
        seed=3,
        threads=1,
        log=lambda step, metrics: logged.update({step: metrics}),
    )
    return logged


def test_loss_falls_and_the_folder_loads(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    logged = _train(tmp_path / "base")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert list(logged) == [20, 40]
    assert logged[40]["heldout_loss"] < logged[20]["heldout_loss"] < 5.1  # ln 162: knowing nothing
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert model.config.vocab_size == len(tokenizer) == 162
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer("3 7 -> 149 :")["input_ids"] == [1, 7, 11, 160, 153, 161]
    assert not list((tmp_path / "base").glob("*.bin"))


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "GPT2LMHeadModel"), ("qwen2", "Qwen2ForCausalLM")])
def test_other_families_learn_and_take_latent_actions(tmp_path: Path, family: str, kind: str) -> None:
    shape = TINY.architecture.model_copy(update={"family": family, "num_hidden_layers": 2})
    logged = _train(
        tmp_path / "base", TINY.model_copy(update={"architecture": shape, "updates": 20, "evaluate_every": 10})
    )
    assert logged[20]["heldout_loss"] < logged[10]["heldout_loss"]
    layers = {"inverse_dynamics_layers": 1, "merge_layers": 1, "policy_layers": 1}
    model = LatentActionLM.from_base(tmp_path / "base", num_actions=4, seed=0, **layers)
    assert type(model.base.lm).__name__ == kind
    prompt = torch.tensor([[1, 7, 11, 160, 153, 161]])
    emitted = model.generate(prompt, max_new_tokens=3, temperature=0.0, stop_token=-1).tokens
    assert torch.equal(
        emitted, model.generate(prompt, max_new_tokens=3, temperature=0.0, stop_token=-1, level="base").tokens
    )


def test_same_seed_same_model(tmp_path: Path) -> None:
    short = TINY.model_copy(update={"updates": 3})
    for name in ("a", "b"):
        _train(tmp_path / name, short)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_rows_are_those_of_the_tasks_encoding_and_targets_the_response() -> None:
    tokenizer = word_tokenizer(Countdown.words)
    demos = list(Countdown().demonstrations("train")[:20])
    ids, targets = encode_rows(tokenizer, demos, 64)
    for row, target, demo in zip(ids.tolist(), targets.tolist(), demos, strict=True):
        expected, start = encode_demonstration(tokenizer, demo, chat=False)
        assert row[: len(expected)] == expected
        assert target == [-100] * start + expected[start:] + [-100] * (len(row) - len(expected))


def test_the_first_updates_read_solved_demonstrations_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, shares = Countdown(), []

    def spy(tokenizer: object, demos: list[Demonstration], max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        shares.append(sum(task.score(demo.prompt, demo.response).success for demo in demos) / len(demos))
        return encode_rows(tokenizer, demos, max_length)  # type: ignore[arg-type]

    monkeypatch.setattr(base_training, "encode_rows", spy)
    _train(tmp_path / "base", TINY.model_copy(update={"updates": 4, "solved_updates": 2}))
    assert shares[1:3] == [1.0, 1.0]  # the first entry is the held-out batch
    assert all(share < 0.7 for share in (shares[0], *shares[3:]))


@pytest.mark.parametrize(
    ("update", "message"), [({"num_workers": 2}, "num_workers: 2"), ({"microbatch_size": 4}, "microbatch_size: 4")]
)
def test_settings_it_does_not_have_are_refused(tmp_path: Path, update: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _train(tmp_path / "base", TINY.model_copy(update=update))


def test_a_word_outside_the_vocabulary_is_named() -> None:
    demos = list(Countdown().demonstrations("train")[:1])
    with pytest.raises(ValueError, match="->"):
        encode_rows(word_tokenizer([str(n) for n in range(150)]), demos, 64)


def test_the_embedded_model_is_small_and_solves_held_out_problems() -> None:
    """60 problems, greedy: it was trained to 0.6 and more."""
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) < 8_000_000
    tokenizer, model = AutoTokenizer.from_pretrained(EMBEDDED), AutoModelForCausalLM.from_pretrained(EMBEDDED)
    task = build_task(TaskConfig())
    prompts = list(task.prompts("heldout")[:60])
    ids = tokenizer([prompt.text for prompt in prompts], return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)[
        :, ids.shape[1] :
    ]
    solved = [
        task.score(p, tokenizer.decode(row, skip_special_tokens=True)).success
        for p, row in zip(prompts, out, strict=True)
    ]  # type: ignore[union-attr]
    assert sum(solved) / len(solved) > 0.4


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_a_saved_tokenizer_is_read_as_it_was(family: Any, tmp_path: Path) -> None:
    """AutoTokenizer takes Qwen2's own in place of any that lies beside a Qwen2 model."""
    tokenizer = word_tokenizer(Countdown.words)
    shape = Architecture(
        family=family, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    new_model(shape, tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = "3 7 25 -> 29 :"
    assert load_tokenizer(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert load_tokenizer(tmp_path, padding_side="left").padding_side == "left"


def test_training_goes_on_from_a_model_made_before(tmp_path: Path) -> None:
    first = _train(tmp_path / "first")
    again = TINY.model_copy(update={"init": str(tmp_path / "first"), "updates": 20, "warmup_updates": 0})
    assert _train(tmp_path / "second", again)[20]["heldout_loss"] < first[40]["heldout_loss"]
    other = word_tokenizer(["a", "b"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"base\.train\.init: .*other was trained on the words of another task"):
        _train(tmp_path / "third", TINY.model_copy(update={"init": str(tmp_path / "other")}))
