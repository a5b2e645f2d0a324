"""``rollout.stop`` beyond the rollout workers: exports, services, MLflow's model, steering, search and the explorer end
where rollouts do. Oracle: the rows of the same policy without strings, cut by hand."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_tools import Config, host_of, make_runner, sample
from transformers import AutoModelForCausalLM, GenerationConfig

from configs.loading import dump_config, load_config
from latent_control import LatentActionLM
from latent_control.auto import LatentActionForCausalLM
from latent_control.search.decoder import Job
from latent_control.text import load_tokenizer
from pipeline.experiments.search_models import decoder_of, load_latent
from pipeline.serving.export import export, find
from pipeline.serving.service import Service
from pipeline.stages.fit_temperature import rewards_at
from pipeline.steering.loading import load
from pipeline.steering.request import SteeringRequest
from pipeline.steering.steerer import Steerer

pytest_plugins = ("rl_fixtures",)
PROMPT, LIMIT = "3 7 25 -> 29 :", 16


def free_row(checkpoint: Path, prompt: Sequence[int]) -> list[int]:
    """The greedy row of the policy, to its limit."""
    out = (
        LatentActionLM.from_pretrained(checkpoint)
        .eval()
        .generate(torch.tensor([prompt]), max_new_tokens=LIMIT, temperature=0.0, stop_token=-1)
    )
    return out.tokens[0].tolist()


@pytest.fixture(scope="module")
def case(finished_run: Path, config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], str]:
    """A run whose rollouts end at a string of two words that the policy says; the greedy row up to it; its text."""
    checkpoint = finished_run / "checkpoints" / "clone"
    folder = tmp_path_factory.mktemp("runs") / "stops"
    shutil.copytree(finished_run, folder)
    settings = load_config(folder / "config.yaml", [])
    tokenizer = load_tokenizer(settings.base.model)
    row = free_row(checkpoint, tokenizer.encode(PROMPT))
    row = row[: next((place for place, token in enumerate(row) if token in (0, 1, 2)), LIMIT)]
    place = next(p for p in range(2, len(row)) if tokenizer.decode(row[p - 1 : p + 1]) not in tokenizer.decode(row[:p]))
    string = tokenizer.decode(row[place - 1 : place + 1])
    rollout = settings.rollout.model_copy(update={"stop": (string,), "max_new_tokens": LIMIT})
    (folder / "config.yaml").write_text(dump_config(settings.model_copy(update={"rollout": rollout})))
    return folder, row[: place + 1], tokenizer.decode(row[: place - 1])


@pytest.fixture(scope="module")
def exported(case: tuple[Path, list[int], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(find(case[0]), tmp_path_factory.mktemp("export") / "stops")


def test_an_export_names_the_strings_and_ends_at_them(case: tuple[Path, list[int], str], exported: Path) -> None:
    folder, row, _ = case
    stop = list(load_config(folder / "config.yaml", []).rollout.stop)
    assert GenerationConfig.from_pretrained(exported).stop_strings == stop
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), load_tokenizer(exported)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    for given in ({}, {"tokenizer": tokenizer}, {"generation_config": GenerationConfig(max_new_tokens=LIMIT)}):
        assert model.generate(ids, **given)[0, ids.shape[1] :].tolist() == row
    assert len(model.generate(ids, stop_strings=[])[0]) > len(ids[0]) + len(row)  # of this call none
    with pytest.raises(ValueError, match="give tokenizer"):
        LatentActionForCausalLM.wrap(model.latent).generate(ids, max_new_tokens=2, stop_strings=["a"])


def test_a_service_obeys_them_beside_the_requests_own(case: tuple[Path, list[int], str], exported: Path) -> None:
    _, row, text = case
    service = Service(exported, "stops", device="cpu")

    def ask(**body: Any) -> dict[str, Any]:
        sent = json.dumps({"prompt": PROMPT, **body}).encode()
        reply = asyncio.run(service.respond("POST", "/v1/completions", sent))
        assert isinstance(reply.body, dict)
        found: dict[str, Any] = reply.body["choices"][0]
        return found

    whole, first = ask(), text.split()[0]
    assert whole["text"].strip() == text and whole["token_ids"] == row and whole["finish_reason"] == "stop"
    own = ask(stop=[first])
    assert own["text"].strip() == "" and own["token_ids"] == row[:1] and own["finish_reason"] == "stop"


def test_steering_ends_where_rollouts_do(case: tuple[Path, list[int], str]) -> None:
    folder, row, text = case
    answer = Steerer(load(folder, device="cpu")).answer(SteeringRequest(prompt=PROMPT, max_tokens=LIMIT))
    assert [token.id for token in answer.tokens] == row and answer.text.strip() == text
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize("chunk", [1, 3, LIMIT])
def test_search_ends_where_rollouts_do(case: tuple[Path, list[int], str], chunk: int) -> None:
    """Also where the string lies across two chunks."""
    folder, row, _ = case
    settings = load_config(folder / "config.yaml", [])
    host = load_latent(folder / "checkpoints" / "clone", settings)
    decoder = decoder_of(host, settings, None, None)
    path, said = decoder.prefill([host.tokenizer.encode(PROMPT)]), list[int]()
    while not path[-1].finished:
        ((segment,),) = decoder.extend([Job(path=path, seeds=(0,), room=LIMIT - len(said))], chunk, greedy=True)
        path, said = [*path, segment], [*said, *segment.tokens]
    assert said == row and path[-1].stopped


def test_rollouts_and_the_fit_of_the_temperature(
    case: tuple[Path, list[int], str], config: Config, tiny_checkpoint: Path
) -> None:
    """The part ``stop`` of the reward is 1 for rows that ended at a string; their tokens end with it."""
    folder, _, _ = case
    stop = load_config(folder / "config.yaml", []).rollout.stop
    words = stop[0].split()
    settings = config(improve={}, rollout={"stop": [words[-1]], "max_new_tokens": 10})
    runner = make_runner(settings, tiny_checkpoint)
    rollouts = sample(runner, host=host_of(tiny_checkpoint))
    ended = [r for r in rollouts if words[-1] in runner.engine.tokenizer.decode(r.tokens)]
    assert ended
    for r in ended:
        says = runner.engine.tokenizer.decode(r.tokens)
        assert says.index(words[-1]) == len(says) - len(words[-1]) and words[-1] not in r.text
        assert r.finish_reason == "stop" and len(r.actions) == len(r.tokens) == len(r.action_logp)
    weights = {"weights": {"stop": 1.0}}
    model, tokenizer = LatentActionLM.from_pretrained(tiny_checkpoint).eval(), load_tokenizer(settings.base.model)
    plain, stopped = (
        rewards_at(model, config(reward=weights, rollout={"max_new_tokens": 10, "stop": s}), tokenizer, 1.0)
        for s in ([], [words[-1]])
    )
    assert sum(map(sum, stopped)) > sum(map(sum, plain))
