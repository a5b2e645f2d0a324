"""What a base LM said is read back as the tokens that it said, whatever its tokenizer makes of their text; and no file
of ``sample`` is refused. Oracle: the log-probabilities at sampling, and transformers' own forward pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from configs.loading import dump_config
from configs.schema import DataSource, RunConfig
from pipeline.cli.main import app
from pipeline.data.sources import Encoder, heldout_rows, training_feed
from pipeline.experiments.sample_base import Sampled
from pipeline.preflight.check import check
from pipeline.preflight.init_config import samples_source
from pipeline.rl.config import workers_config
from pipeline.rl.heldout import heldout_requests
from rollout_workers.env_runner import LMEnvRunner
from rollout_workers.model_host import WorkerSettings
from rollout_workers.rollouts import HostSpec, Rollout
from rollout_workers.tasks import build_task
from rollout_workers.tasks.encoding import encode_demonstration
from rollout_workers.tasks.sampled_ids import COLUMN, fingerprint

PIECES = ["<pad>", "<s>", "</s>", *"abcdefg 12", *(x + y for x in "abcdefg 12" for y in "abcdefg 12"), "<think>"]
END, THINK = 2, len(PIECES) - 1


def tokenizer_of(merges: bool = True) -> PreTrainedTokenizerFast:
    """Pairs of letters are tokens of their own, so most texts can be written in several ways."""
    known = {piece: number for number, piece in enumerate(PIECES)}
    pairs = [(piece[0], piece[1]) for piece in PIECES[13:-1]]
    backend = Tokenizer(models.BPE(vocab=known, merges=pairs if merges else pairs[:1]))
    backend.decoder, backend.pre_tokenizer = decoders.Fuse(), pre_tokenizers.Split(",", "isolated")
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    return tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base LM that mostly ends within twelve tokens, now and then at once."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer_of().save_pretrained(folder)
    torch.manual_seed(3)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 114}
    shape |= {"num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END}
    lm = LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.3))
    with torch.no_grad():  # many ends
        lm.lm_head.weight[[0, 1]] = 0.0
        lm.lm_head.weight[END] *= 4.0
    lm.save_pretrained(folder)
    return folder


def config_of(base: Path, folder: Path, *, rows: int = 24, **rollout: Any) -> RunConfig:
    """Prompts of letters; every response is judged by a function of one's own."""
    lines = [
        json.dumps({"prompt": f"{n % 2}{'abcdefg'[n % 7]} {n}".replace("0", "1"), "answer": "a"}) for n in range(rows)
    ]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    task = {"name": "jsonl", "options": {"path": str(folder / "rows.jsonl")}}
    return RunConfig(base={"model": str(base)}, task=task, rollout={"max_new_tokens": 12, **rollout})


def sampled(config: RunConfig, samples: int = 6) -> tuple[Sampled, list[Rollout]]:
    """What ``latent-control sample`` keeps, sampled in this process."""
    host = HostSpec(level="base", checkpoint=config.base.model)
    settings = WorkerSettings(
        host=None, policy_dtype="float32", task=config.task, rollout=config.rollout, reward=config.reward
    )
    worker = LMEnvRunner(config=workers_config(config, settings), worker_index=0)
    prompts = len(build_task(config.task).prompts("train"))
    (asked,) = heldout_requests(config, prompts, 1, samples=samples, temperature=config.rollout.temperature, host=host)
    rollouts = worker.sample(request=replace(asked, split="train"))
    found = Sampled(prompts=prompts, rollout=config.rollout)
    found.add(rollouts, fingerprint(tokenizer_of()))
    return found, rollouts


def read_back(config: RunConfig, found: Sampled, folder: Path) -> list[tuple[tuple[int, ...], int]]:
    """(ids, where the response starts) of all rows of the file, as the stage that finds codes reads them."""
    (folder / "samples.jsonl").write_text("".join(found.rows))
    source = DataSource.model_validate(samples_source(str(folder / "samples.jsonl"), chat=False))
    task, encoder = build_task(config.task), Encoder(tokenizer=tokenizer_of(), chat=False, max_length=256)
    held = list(heldout_rows(source, task, encoder, seed=0))
    assert source.task is not None
    count = len(build_task(source.task).demonstrations("train"))
    feed = training_feed(source, task, encoder, seed=0)
    rows = [*held, *(feed.take((place + 0.5) / count) for place in range(count))]
    return [(tuple(row.ids), row.start) for row in rows]


def nll(lm: LlamaForCausalLM, ids: Sequence[int], start: int) -> torch.Tensor:
    """Per token of the response, by transformers."""
    logits = lm(torch.tensor([ids])).logits[0].detach()
    return -logits.log_softmax(-1)[torch.arange(start - 1, len(ids) - 1), torch.tensor(ids[start:])]


@pytest.mark.parametrize("rollout", [{}, {"stop": ["g", "1a"]}, {"max_new_tokens": 1}], ids=["", "stop", "truncated"])
def test_rows_have_the_likelihood_that_they_were_sampled_with(base: Path, tmp_path: Path, rollout: Any) -> None:
    config = config_of(base, tmp_path, **rollout)
    found, rollouts = sampled(config)
    kept = [r for r in rollouts if r.text and r.truncated == (not found.ended)]
    wanted = {(*r.prompt_tokens.tolist(), *r.tokens.tolist()): -r.action_logp for r in kept}
    back = read_back(config, found, tmp_path)
    assert sorted(ids for ids, _ in back) == sorted((*r.prompt_tokens.tolist(), *r.tokens.tolist()) for r in kept)
    lm = LlamaForCausalLM.from_pretrained(base).eval()
    for ids, start in dict(back).items():
        assert torch.allclose(nll(lm, ids, start), torch.from_numpy(wanted[ids]), rtol=0, atol=1e-4)
    if found.ended:  # the test tests something: the texts alone say other tokens, which the base never meant
        tokenizer = tokenizer_of()
        demos = list(map(json.loads, found.rows))
        other = sum(tuple(tokenizer.encode(f" {d['answer']}")) != tuple(d[COLUMN]["response"][:-1]) for d in demos)
        assert other > len(demos) / 2


def test_special_tokens_are_in_the_texts_and_the_ids(base: Path, tmp_path: Path) -> None:
    found, _ = sampled(config_of(base, tmp_path))
    rows = list(map(json.loads, found.rows))
    said = [row for row in rows if THINK in row[COLUMN]["response"]]
    assert said and all("<think>" in row["answer"] for row in said)
    assert not any("</s>" in row["answer"] for row in rows)


def test_ends_at_once_are_left_out_and_counted_and_the_rest_is_taken(base: Path, tmp_path: Path) -> None:
    config = config_of(base, tmp_path)
    found, rollouts = sampled(config)
    blank = sum(not r.text for r in rollouts)
    assert 0 < blank == found.blank and len(found.ended) + len(found.truncated) + blank == len(rollouts)
    assert any(line.startswith(f"{blank} of {len(rollouts)} responses have no text") for line in found.words())
    (tmp_path / "samples.jsonl").write_text("".join(found.rows))
    data = [samples_source(str(tmp_path / "samples.jsonl"), chat=False)]
    settings = config.model_dump(mode="json")
    settings |= {"actions": {"data": data, **LAYERS}, "clone": {"data": data}, "improve": {}}
    errors, warnings, _ = check(RunConfig.model_validate(settings))
    assert not errors and not any("sampled" in warning for warning in warnings)


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.jsonl.gz", "a"])
def test_a_file_that_run_would_not_read_is_not_written(base: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "c.yaml").write_text(dump_config(config_of(base, tmp_path)))
    done = CliRunner().invoke(app, ["sample", str(tmp_path / "c.yaml"), "-o", str(tmp_path / name)])
    assert done.exit_code == 2 and f"{name} would not be read" in done.output and "end it with .jsonl" in done.output


LAYERS = {"inverse_dynamics_layers": 1, "merge_layers": 1, "policy_layers": 1}


def test_what_does_not_end_is_kept_and_said(base: Path, tmp_path: Path) -> None:
    config = config_of(base, tmp_path, max_new_tokens=1, temperature=0.5)
    found, _ = sampled(config)
    assert found.rows == found.truncated and all(json.loads(row)[COLUMN]["truncated"] for row in found.rows)
    said = " ".join(found.words())
    assert "did not end within rollout.max_new_tokens=1 (temperature=0.5, stop=[])" in said and "kept" in said
    prompt = build_task(config.task).prompts("train")[0].text
    assert repr(prompt) in said and f"of {found.prompts} prompts" in said


def test_rows_of_one_prompt_and_of_two_are_taken(base: Path, tmp_path: Path) -> None:
    found, _ = sampled(config_of(base, tmp_path), samples=12)
    rows = list(map(json.loads, found.rows))
    for count in (1, 2):
        prompts = sorted({row["prompt"] for row in rows})[:count]
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["prompt"] in prompts))
        source = DataSource.model_validate(samples_source(str(path), chat=False))
        assert source.task is not None
        task = build_task(source.task)
        assert len(task.demonstrations("train")) and len(task.demonstrations("heldout"))


def test_ids_of_another_tokenizer_are_not_read_and_it_is_said(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(base, tmp_path)
    found, _ = sampled(config)
    foreign = [row.replace(fingerprint(tokenizer_of()), "0123456789abcdef") for row in found.rows]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(foreign))
    source = DataSource.model_validate(samples_source(str(path), chat=False))
    assert source.task is not None
    demo = build_task(source.task).demonstrations("train")[0]
    ids, start = encode_demonstration(tokenizer_of(), demo, chat=False)
    assert ids[start:] == [*tokenizer_of().encode(f" {demo.response}"), END]
    assert demo.ids is not None
    cut = replace(demo, ids=replace(demo.ids, truncated=True))
    assert encode_demonstration(tokenizer_of(), cut, chat=False) == (ids[:-1], start)
    assert "another tokenizer (fingerprint 0123456789abcdef)" in caplog.text
    settings = config.model_dump(mode="json") | {"actions": {"data": [source.model_dump()], **LAYERS}, "clone": {}}
    errors, warnings, _ = check(RunConfig.model_validate(settings))
    assert not errors and any("another tokenizer" in warning and "actions.data[0]" in warning for warning in warnings)


def test_a_fingerprint_is_of_what_ids_mean(tmp_path: Path) -> None:
    tokenizer = tokenizer_of()
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    again(["a", "ab"], padding=True, truncation=True, max_length=3)  # leaves settings in the tokenizer
    assert fingerprint(again) == fingerprint(tokenizer) == fingerprint(tokenizer_of(merges=False))
    again.add_tokens(["new"])
    assert fingerprint(again) != fingerprint(tokenizer)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"response": ["a"]}, "holds no token ids"),
        ({"response": []}, "holds no token ids"),
        ({"prompt": [-1]}, "holds no token ids"),
        ({"response": [5000]}, "token id 5000, but the base LM's are 0 to 113"),
    ],
)
def test_damaged_ids_are_found_before_work_starts(base: Path, tmp_path: Path, damage: Any, said: str) -> None:
    config = config_of(base, tmp_path)
    found, _ = sampled(config, samples=2)
    rows = list(map(json.loads, found.rows))
    rows[1][COLUMN] |= damage
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [samples_source(str(path), chat=False)]
    settings = config.model_dump(mode="json") | {"actions": {"data": data, **LAYERS}, "clone": {}}
    found_errors = check(RunConfig.model_validate(settings)).errors
    assert sum("token id" in error for error in found_errors) == 1  # one check, and one owner
    assert any(said in error and "latent-control sample" in error for error in found_errors)
    rows[1][COLUMN] = "mine"  # a column of the user's that has this name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert not check(RunConfig.model_validate(settings)).errors
