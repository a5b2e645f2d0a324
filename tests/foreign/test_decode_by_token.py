"""Greedy decoding of a latent policy has two meanings, the token of the best code and the best token of the mixture
over codes: each is what it says, both are reported, and what has no meaning is refused."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from configs.checks import cross_field_problems
from configs.loading import dump_config
from configs.schema import Decoding, Evaluation, RunConfig
from latent_control import LatentActionForCausalLM, LatentActionLM
from latent_control.decoding import mixture
from latent_control.decoding.action_decoder import ActionDecoder
from latent_control.decoding.mixture import MixtureDecoder, pick_tokens
from latent_control.decoding.sampling_params import MIXTURE_CODES, SamplingParams
from learners.collate import collate
from pipeline.cli.output import result_table
from pipeline.evaluation import results
from pipeline.evaluation.gates import judge_gates
from pipeline.evaluation.outcome_file import write_outcomes
from pipeline.evaluation.outcomes import Outcome
from pipeline.evaluation.results import Played
from pipeline.experiments.compare import compare
from pipeline.pages.report import results as report
from pipeline.serving import export as exporting
from pipeline.serving.service import Service
from rollout_workers.openai_api.errors import RefusedRequest
from rollout_workers.rollouts import RolloutRequest

pytest_plugins = ("rl_fixtures",)

PROMPTS = torch.tensor([[5, 9, 11, 7, 30], [0, 0, 8, 21, 4], [0, 3, 14, 15, 40]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])


# -- the mixture by hand -----------------------------------------------------------------------------------------------


def chooser(given: list[list[float]], span: int = 1, mixture_codes: int | None = 16) -> MixtureDecoder:
    """Codes whose tokens have the probabilities ``given`` [N, V], whatever the state."""
    table = torch.tensor(given).log()
    actor = ActionDecoder(
        stack=None,
        reads="final",
        head=torch.nn.Identity(),
        emit=lambda _, codes: table[codes].argmax(-1),
        world_logits=lambda final, codes: table[codes] + final[..., :1] * 0,
        span=span,
    )
    head = torch.nn.Linear(1, len(given[0]), bias=False)
    base: Any = SimpleNamespace(
        lm=SimpleNamespace(get_output_embeddings=lambda: head, device=torch.device("cpu")),
    )
    return MixtureDecoder(base, actor, mixture_codes, slots=2)


def choose(mixed: MixtureDecoder, policy: list[list[float]], place: int = 0) -> tuple[list[int], list[int]]:
    """(codes, tokens) of rows whose policy gives these probabilities."""
    rows = len(policy)
    greedy = partial(pick_tokens, temperature=0.0, uniforms=torch.zeros(rows))
    chosen = mixed.choose(list(range(rows)), [place] * rows, torch.zeros(rows, 1), torch.tensor(policy).log(), greedy)
    return chosen[0].tolist(), chosen[1].tolist()


GIVEN = [[0.9, 0.1, 0.0], [0.1, 0.8, 0.1], [0.1, 0.8, 0.1], [0.2, 0.0, 0.8]]
# 0.4 0.3 0.3 0: token 0 has 0.36 + 0.06 = 0.42, token 1 has 0.04 + 0.48 = 0.52
POLICY = [[0.4, 0.3, 0.3, 0.0]]


def test_two_codes_that_agree_outvote_the_most_likely_one() -> None:
    greedy = chooser(GIVEN, mixture_codes=None)
    assert choose(greedy, POLICY) == ([1], [1]), "of the equal codes 1 and 2 the lower number is recorded"
    assert choose(chooser(GIVEN, mixture_codes=1), POLICY) == ([0], [0]), "one code: greedy by code"
    # two codes: 0 and, of the equally likely ones, 1: token 0 has 0.39, token 1 has 0.28
    assert choose(chooser(GIVEN, mixture_codes=2), POLICY) == ([0], [0])
    # 0.495 + 0.025 + 0.02 against 0.055 + 0.2 + 0.16
    assert choose(greedy, [[0.55, 0.25, 0.2, 0.0]]) == ([0], [0])
    assert choose(greedy, [[0.38, 0.3, 0.32, 0.0]]) == ([2], [1])


def test_rows_and_codes_computed_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*POLICY, [0.1, 0.0, 0.0, 0.9]]
    whole = choose(chooser(GIVEN, mixture_codes=None), rows)
    assert whole == ([1, 3], [1, 2])
    for most in (1, 6, 12):
        monkeypatch.setattr(mixture, "NUMBERS_AT_ONCE", most)
        assert choose(chooser(GIVEN, mixture_codes=None), rows) == whole


def test_inside_a_span_codes_are_as_likely_as_its_tokens_make_them() -> None:
    """After token 1, code 0 has 0.4 x 0.1 / 0.52, codes 1 and 2 have 0.24 / 0.52 each: token 1 again, by 0.75; what the
    policy says there is not asked."""
    mixed = chooser([[0.9, 0.1, 0.0], [0.0, 0.8, 0.2], [0.3, 0.1, 0.6]], span=3, mixture_codes=None)
    assert choose(mixed, [[0.4, 0.3, 0.3]])[1] == [0]  # 0.45, 0.31, 0.24
    # given token 0: 0.36 : 0 : 0.09, so token 0 has (0.324 + 0.027) / 0.45
    assert choose(mixed, [[0.0, 1.0, 0.0]], place=1) == ([0], [0])
    assert torch.allclose(mixed.held.kept[1][0].exp(), torch.tensor([0.324, 0.0, 0.027]) / 0.351)
    assert choose(mixed, [[0.0, 1.0, 0.0]], place=3) == ([1], [1]), "a new span asks the policy again"


# -- the whole model against a pass without caches, batches or tables --------------------------------------------------


@torch.no_grad()
def oracle(model: LatentActionLM, prompt: list[int], new: int, codes: list[int | None], allowed: set[int]) -> list[int]:
    """Tokens by sum_a pi(a) p(x_1 | a) p(x_2 | a, x_1) .., every code a pass of its own over the whole row."""
    count, span, row = model.config.num_actions, model.config.span, list(prompt)
    for place in range(new):
        start = place - place % span
        ids = torch.tensor([row])
        features = model.features(ids)
        prior = model.policy_logits(features)[0, len(prompt) - 1 + start].double()
        forced = codes[start] if start < len(codes) else None
        may = allowed if forced is None else {forced}
        prior[[code for code in range(count) if code not in may]] = -torch.inf
        total = torch.zeros(model.base.lm.config.vocab_size, dtype=torch.float64)
        for code, weight in enumerate(prior.softmax(-1).tolist()):
            world = model.world_logits(features, torch.full_like(ids, code))[0, len(prompt) - 1 :].double().softmax(-1)
            for step in range(start, place):
                weight *= float(world[step, row[len(prompt) + step]])
            total += weight * world[place]
        row.append(int(total.argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize(
    ("shape", "slots"),
    [
        ({}, 1),
        ({"num_actions": 3, "policy_reads": "final"}, 2),
        ({"num_actions": 21, "merge_layers": 1}, 3),
        ({"head": "official"}, 3),
        ({"span": 2}, 1),
        ({"span": 3, "policy_reads": "final", "num_actions": 5}, 2),
    ],
    ids=str,
)
def test_greedy_by_token_with_all_codes_is_the_argmax_of_the_mixture(
    make_model: Any, shape: dict[str, Any], slots: int
) -> None:
    model = make_model(**shape)
    count, span = model.config.num_actions, model.config.span
    with torch.no_grad():
        model.codebook[count - 1] = model.codebook[0]  # equivalent codes
    settings: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0.0, "stop_token": -1, "batch_size": slots}
    forced: list[int | None] = [1] * span + [None] * span
    for steered in ({}, {"codes": forced}, {"allowed_codes": [0, 2, count - 1]}):
        out = model.generate(PROMPTS, MASK, decode="token", mixture_codes=None, **settings, **steered)
        for row, mask, tokens in zip(PROMPTS.tolist(), MASK.tolist(), out.tokens.tolist(), strict=True):
            prompt = [token for token, real in zip(row, mask, strict=True) if real]
            allowed = set(steered.get("allowed_codes", range(count)))
            assert tokens == oracle(model, prompt, 5, steered.get("codes", []), allowed)
    one = model.generate(PROMPTS, MASK, decode="token", mixture_codes=1, **settings)
    by_code = model.generate(PROMPTS, MASK, **settings)
    assert torch.equal(one.tokens, by_code.tokens) and torch.equal(one.actions, by_code.actions)
    assert torch.allclose(one.action_logp, by_code.action_logp)
    every = model.generate(PROMPTS, MASK, codes=forced * 3, **settings)
    assert torch.equal(
        every.tokens[:, :span],
        model.generate(PROMPTS, MASK, codes=forced * 3, decode="token", **settings).tokens[:, :span],
    ), "where the code is forced, both are the same"


def test_it_is_what_the_marginal_of_transformers_interface_says(make_model: Any) -> None:
    model = make_model(num_actions=16)
    auto = LatentActionForCausalLM.wrap(model)
    settings: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.0, "stop_token": -1}
    out = model.generate(PROMPTS[:1], decode="token", mixture_codes=None, **settings)
    whole = torch.cat([PROMPTS[:1], out.tokens], 1)
    logits = auto(input_ids=whole[:, :-1]).logits[0, PROMPTS.shape[1] - 1 :]
    assert out.tokens[0].tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampling_draws_tokens_from_the_mixture(make_model: Any, temperature: float) -> None:
    model = make_model()
    auto = LatentActionForCausalLM.wrap(model)
    wanted = (auto(input_ids=PROMPTS[:1]).logits[0, -1] / temperature).softmax(-1)
    out = model.generate(
        PROMPTS[:1],
        max_new_tokens=1,
        temperature=temperature,
        repeats=4000,
        seed=1,
        decode="token",
        mixture_codes=None,
        stop_token=-1,
    )
    found = torch.bincount(out.tokens[:, 0], minlength=len(wanted)) / 4000
    # half of sum |difference| of 4000 draws over 48 tokens: 0.03 at most, by chance
    assert 0.5 * float((found - wanted).abs().sum()) < 0.05
    by_code = model.generate(PROMPTS[:1], max_new_tokens=1, repeats=4000, seed=1, stop_token=-1).tokens[:, 0]
    assert len(by_code.unique()) <= 8 < len(out.tokens[:, 0].unique()), "a code has one token, the mixture has all"


# -- what has no meaning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"decode": "tokens"}, "decode='tokens'"),
        ({"decode": "token", "mixture_codes": 0}, "mixture_codes=0"),
        ({"decode": "token", "mixture_codes": True}, "mixture_codes=True"),
        ({"decode": "token", "mixture_codes": "all"}, "mixture_codes='all'"),
        ({"decode": "token", "top_k": 3}, "top_k=3 has no meaning beside decode='token'"),
        ({"decode": "token", "aliases": 4}, "aliases=4 has no meaning beside decode='token'"),
        ({"decode": "token", "level": "base"}, "an action is a token: leave decode out"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(model: LatentActionLM, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        model.generate(PROMPTS, MASK, max_new_tokens=2, **settings)


def test_such_rows_are_no_training_data() -> None:
    asked: dict[str, Any] = {"request_id": 0, "prompt_indices": (0,), "seeds": (1,), "group_size": 1}
    assert RolloutRequest(split="heldout", decode="token", **asked).decode == "token"
    with pytest.raises(ValueError, match="sample training rollouts with decode='code'"):
        RolloutRequest(split="train", decode="token", **asked)
    row: Any = SimpleNamespace(decode="token")
    with pytest.raises(ValueError, match="no sampled codes to train on"):
        collate([row])


# -- where it is chosen ------------------------------------------------------------------------------------------------


def test_the_default_has_one_value() -> None:
    assert Decoding().decode == SamplingParams(max_new_tokens=1).decode == "code"
    assert Decoding().mixture_codes == SamplingParams(max_new_tokens=1).mixture_codes == MIXTURE_CODES


def test_transformers_takes_it_from_the_generation_config(make_model: Any, tmp_path: Path) -> None:
    model = make_model(num_actions=16)
    auto = LatentActionForCausalLM.wrap(model)
    asked: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": 8}
    by_code, by_token = (
        model.generate(PROMPTS, MASK, max_new_tokens=8, temperature=0.0, decode=way, mixture_codes=4).tokens
        for way in ("code", "token")
    )
    assert not torch.equal(by_code, by_token)

    def new(host: LatentActionForCausalLM, **more: Any) -> torch.Tensor:
        found = host.generate(PROMPTS, **asked, **more)
        assert isinstance(found, torch.Tensor)
        return found[:, 5:]

    assert torch.equal(new(auto), by_code)
    assert torch.equal(new(auto, decode="token", mixture_codes=4), by_token)
    auto.generation_config.decode, auto.generation_config.mixture_codes = "token", 4
    auto.save_pretrained(tmp_path / "m")
    loaded = LatentActionForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(new(loaded), by_token) and torch.equal(new(loaded, decode="code"), by_code)
    with pytest.raises(ValueError, match="top_k=3 has no meaning"):
        new(loaded, do_sample=True, top_k=3)


def exported(checkpoint: Path, folder: Path, **decoding: Any) -> Path:
    """An export of a run whose config says ``decoding``."""
    folder.mkdir()
    config = RunConfig(base={"model": "x"}, decoding=decoding, tracking={"enabled": False})
    (folder / "config.yaml").write_text(dump_config(config))
    return exporting.export(exporting.Source(checkpoint=checkpoint, run_dir=folder), folder / "out")


def reply(service: Service, **body: Any) -> list[int]:
    found = asyncio.run(service.respond("POST", "/v1/completions", json.dumps(body).encode()))
    if found.status != 200:
        raise RefusedRequest(found.body["error"]["message"], found.status, found.body["error"]["param"])
    return found.body["choices"][0]["token_ids"]


def test_export_service_and_mlflow_model_start_from_the_config(tiny_checkpoint: Path, tmp_path: Path) -> None:
    plain = exported(tiny_checkpoint, tmp_path / "plain")
    chosen = exported(tiny_checkpoint, tmp_path / "chosen", decode="token", mixture_codes=None)
    kept = [json.loads((folder / "generation_config.json").read_text()) for folder in (plain, chosen)]
    assert [(one["decode"], one["mixture_codes"]) for one in kept] == [("code", MIXTURE_CODES), ("token", 8)]
    latent = LatentActionLM.from_pretrained(tiny_checkpoint)
    services = {name: Service(folder, "m", device="cpu") for name, folder in (("plain", plain), ("chosen", chosen))}
    services["told"] = Service(plain, "m", device="cpu", decode="token")
    text = next(text for text in ("3 5 7", "1 2", "8 9", "4 4 4", "9", "2 6 1") if differs(latent, services, text))
    ids = services["plain"].tokenizer(text, return_tensors="pt").input_ids
    by = {way: latent.generate(ids, max_new_tokens=12, temperature=0.0, decode=way, mixture_codes=8) for way in WAYS}
    wanted = {way: out.tokens[0, : int(out.lengths[0])].tolist() for way, out in by.items()}
    ask: dict[str, Any] = {"prompt": text, "max_tokens": 12}
    assert reply(services["plain"], **ask) == wanted["code"] != wanted["token"]
    assert reply(services["chosen"], **ask) == reply(services["told"], **ask) == wanted["token"]
    for service in services.values():
        assert [reply(service, decode=way, **ask) for way in WAYS] == [wanted["code"], wanted["token"]]
    with pytest.raises(RefusedRequest, match="top_k=2 has no meaning with decode=token") as refused:
        reply(services["chosen"], top_k=2, **ask)
    assert refused.value.param == "top_k"
    with pytest.raises(RefusedRequest, match=r"decode: .*'code' or 'token'"):
        reply(services["plain"], decode="both", **ask)
    # an export whose file was edited
    (plain / "generation_config.json").write_text(json.dumps(kept[0] | {"decode": "tokens"}))
    with pytest.raises(ValueError, match="decode='tokens'"):
        Service(plain, "m", device="cpu")


WAYS = ("code", "token")


def differs(latent: LatentActionLM, services: dict[str, Service], text: str) -> bool:
    ids = services["plain"].tokenizer(text, return_tensors="pt").input_ids
    first, second = (latent.generate(ids, max_new_tokens=12, temperature=0.0, decode=way).tokens for way in WAYS)
    return not torch.equal(first, second)


@pytest.mark.slow
def test_the_mlflow_model_takes_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from pipeline.serving.mlflow_model import LatentModel
    from pipeline.serving.registry import signature

    folder = exported(tiny_checkpoint, tmp_path / "chosen", decode="token")
    model = LatentModel()
    model.load_context(SimpleNamespace(artifacts={"export": str(folder)}))
    frame = {"prompt": ["3 5 7", "1 2", "8 9", "4 4 4"]}
    answers = {way: model.predict(None, frame, {"decode": way})["text"].tolist() for way in ("", *WAYS)}
    assert answers[""] == answers["token"] != answers["code"]
    assert {param.name: param.default for param in signature().params}["decode"] == ""


# -- what is reported --------------------------------------------------------------------------------------------------


def outcomes(mode: Any, marks: str, variant: str = "improved") -> list[Outcome]:
    """A capital letter is a success."""
    return [
        Outcome(
            variant=variant,
            mode=mode,
            prompt_id=f"t/heldout/{number}",
            sample=0,
            success=letter.isupper(),
            reward=float(letter.isupper()),
            reward_parts={},
            response=letter,
            prompt=f"q{number}",
            new_tokens=2,
        )
        for number, letter in enumerate(marks)
    ]


def evaluation() -> dict[str, Any]:
    """Base: 1 of 4 greedy. Improved: 2 by code, 3 by token, at 1.5 times the seconds."""
    played = {
        "base": Played(sampled=outcomes("sampled", "aaaa"), greedy=outcomes("greedy", "Aaaa")),
        "improved": Played(
            sampled=outcomes("sampled", "AAAa"),
            greedy=outcomes("greedy", "AAaa"),
            greedy_token=outcomes("greedy_token", "AAAa"),
            token_cost=1.5,
        ),
    }
    slices = {"half": ["first", "first", "last", "last"]}
    settings = Evaluation(slices=("half",), slice_minimum=1)
    rows = {name: results.variant_numbers(one, settings, 0, None, slices) for name, one in played.items()}
    return {
        "prompts": 4,
        "samples_per_prompt": 1,
        "mixture_codes": 5,
        **rows,
        "differences": results.differences(played, 1, {}, 0),
    }


def test_both_are_reported_beside_sampled() -> None:
    found = evaluation()
    assert (found["improved"]["greedy"], found["improved"]["greedy_token"]) == (0.5, 0.75)
    assert found["improved"]["greedy_token_interval"] == pytest.approx([0.1941, 0.9937], abs=1e-4)  # exact, 3 of 4
    assert (found["improved"]["greedy_token_tokens"], found["improved"]["greedy_token_failures"]) == (2.0, 0)
    assert (found["improved"]["slice_gap_greedy"], found["improved"]["slice_gap_greedy_token"]) == (1.0, 0.5)
    assert not [name for name in found["base"] if "token" in name and "tokens" not in name]
    gains = found["differences"]["improved - base"]
    assert (gains["greedy"]["mean"], gains["greedy_token"]["mean"]) == (0.25, 0.5), "base has one greedy: 1 of 4"
    table = result_table(found)
    assert (
        "greedy by token  success  95 % interval  seconds\nimproved         0.750    0.194 - 0.994  1.50 x\n" in table
    )
    assert "gain             greedy by token  95 % interval\nimproved - base  +0.500" in table
    assert "over the 5 likeliest codes" in table and max(map(len, table.splitlines()[:9])) <= 80
    page = report.sentence(found)
    assert "0.500 greedy (0.750 by token)" in page and "greedy by token +0.500" in page
    assert report._success({n: found[n] for n in ("base", "improved")}, "").rows[0][5:7] == ["–", "–"]


def test_summaries_from_before_are_shown_as_they_were() -> None:
    found = evaluation()
    old = {name: value for name, value in found.items() if name != "mixture_codes"}
    for row in (old["improved"], old["differences"]["improved - base"]):
        for name in [name for name in row if name.startswith("greedy_token")]:
            del row[name]
    table = result_table(old)
    assert "by token" not in table and table.endswith("one sampled and one greedy rollout per prompt")
    rows = {name: old[name] for name in ("base", "improved")}
    names = [name for name in report._success(rows, "").head if "interval" not in name]
    assert names == ["model", "sampled", "greedy", "tokens"]
    assert "by token" not in report.sentence(old)


def test_a_gate_names_the_one_it_looks_at() -> None:
    verdicts = judge_gates(["improved.greedy >= 0.6", "greedy_token >= 0.6"], evaluation(), "improved")
    assert [(v.value, v.passed) for v in verdicts] == [(0.5, False), (0.75, True)]
    sections: dict[str, Any] = {"base": {"model": "x"}, "actions": {}, "clone": {}, "improve": {}}
    assert cross_field_problems(RunConfig(**sections, gates=["cloned.greedy_token >= 0.1"])) == []
    (problem,) = cross_field_problems(RunConfig(**sections, gates=["base.greedy_token >= 0.1"]))
    assert "base has no latent actions" in problem


def run_folder(folder: Path, *rows: list[Outcome], level: str = "latent") -> Path:
    folder.mkdir()
    config = RunConfig(base={"model": "x"}, actions={}, clone={}, improve={"level": level}, tracking={"enabled": False})
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "summary.json").write_text(json.dumps({"stages": {}}))
    (folder / "metrics.jsonl").write_text("")
    write_outcomes(folder / "evaluation.parquet", [one for some in rows for one in some])
    return folder


def test_compare_reads_both_where_there_are_both(tmp_path: Path) -> None:
    sampled = outcomes("sampled", "AAaa")
    new = run_folder(tmp_path / "a", sampled, outcomes("greedy", "Aaaa"), outcomes("greedy_token", "AAAa"))
    same = run_folder(tmp_path / "b", sampled, outcomes("greedy", "AAaa"), outcomes("greedy_token", "AAaa"))
    old = run_folder(tmp_path / "c", sampled, outcomes("greedy", "AAaa"))
    tokens = run_folder(tmp_path / "d", sampled, outcomes("greedy", "AAaa"), level="token")
    means = {mode: round(d["mean"], 3) for mode, d in compare([new], [same])["success"].items()}
    assert means == {"sampled": 0.0, "greedy": -0.25, "greedy_token": 0.25}
    assert compare([new], [old])["success"].keys() == {"sampled", "greedy"}
    assert compare([old], [old])["success"].keys() == {"sampled", "greedy"}
    against = compare([new], [tokens])["success"]
    assert against["greedy_token"]["mean"] == pytest.approx(0.25), "a policy over tokens has one greedy"
    assert np.isclose(against["greedy"]["mean"], -0.25)


def test_an_old_config_loads(tmp_path: Path) -> None:
    from configs.loading import load_config

    path = run_folder(tmp_path / "a", outcomes("greedy", "A")) / "config.yaml"
    text = path.read_text()
    assert "decoding:" in text
    kept = text.split("\n")
    first = kept.index("decoding:")
    last = next(i for i in range(first + 1, len(kept)) if not kept[i].startswith(" "))
    path.write_text("\n".join(kept[:first] + kept[last:]))
    assert load_config(path, [], check_paths=False).decoding == Decoding()
