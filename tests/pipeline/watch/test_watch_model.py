"""What ``watch`` asks a run's model: counterfactuals of any rollout, where codes fire, ablations; and its notes."""

from __future__ import annotations

import json
import os
import signal
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import Explorer
from pipeline.pages.explorer.build import explore
from pipeline.pages.explorer.page import write_page
from pipeline.pages.records import as_data
from pipeline.watch.model_process import ModelProcess
from pipeline.watch.model_work import Ablation, Fires, ModelWork
from pipeline.watch.notes import MOST_NOTES, Note, keep_note, read_notes
from rollout_workers.openai_api.errors import RefusedRequest

pytest_plugins = ("watch_fixtures", "rl_fixtures", "explorer_fixtures", "watch_model_fixtures")
BAR_SECONDS = 120.0
"""Of a first question: the process starts, and loads a model."""


@pytest.fixture(scope="module")
def work(explored_run: Path) -> ModelWork:
    return ModelWork(explored_run, 4.0)


def plain(why: dict[str, Any], vocabulary: list[str]) -> list[Any]:
    """Steps with texts for tokens: vocabularies differ."""
    return [
        (
            step["position"],
            [(o["code"], o["before"], o["after"], vocabulary[o["token"]]) for o in step["options"]],
            [(vocabulary[m[0]], *m[1:]) for m in step["masses"]],
            [(e["code"], [vocabulary[t] for t in e["tokens"]], e["reward"]) for e in step["endings"]],
        )
        for step in why["steps"]
    ]


class TestCounterfactuals:
    def test_they_are_those_of_the_explorers_page(self, run):
        data = as_data(explore(run.folder, Explorer(seconds=60.0, explained=2))[0])
        for why in data["why"]:
            shown = data["rollouts"][why["rollout"]]
            found = run.explained(shown["id"])
            assert plain(found["why"][0], found["vocabulary"]) == plain(why, data["vocabulary"])
            (own,) = found["rollouts"]
            assert (own["codes"], own["reward"], own["update"]) == (shown["codes"], shown["reward"], shown["update"])
            assert own["advantage"] == pytest.approx(shown["advantage"], abs=1e-3) and found["note"] == ""

    def test_a_heldout_answer_is_played_again(self, run):
        assert json.loads(json.dumps(run.heldout()["variant"].to_pylist())) == ["base", "improved", "improved"]
        (row,) = [
            one for one in run.heldout().to_pylist() if (one["variant"], one["finish_reason"]) == ("improved", "greedy")
        ]
        found = run.explained(row["rollout_id"])
        (shown,) = found["rollouts"]
        assert found["note"] == "" and found["summary"]["heldout"] and shown["advantage"] is None
        assert "".join(found["vocabulary"][t] for t in shown["tokens"]).startswith(row["text"].strip()[:1])
        assert len(found["why"][0]["steps"]) == len(shown["tokens"]) > 0
        assert [one["rollout_id"] for one in run.group(row["prompt_id"])] == [
            f"{name}/{row['prompt_id']}/0" for name in ("base/greedy", "improved/sampled", "improved/greedy")
        ]

    def test_what_comes_out_otherwise_and_what_cannot_be_played_is_said(self, run):
        ids = {(row["variant"], row["finish_reason"]): row["rollout_id"] for row in run.heldout().to_pylist()}
        assert "differs from the evaluation" in run.explained(ids["improved", "sampled"])["note"]
        with pytest.raises(
            RefusedRequest, match="counterfactuals of held-out answers are those of the improved policy"
        ):
            run.explained(ids["base", "greedy"])
        with pytest.raises(LookupError, match="has no rollout 'none'"):
            run.explained("none")


class TestProcess:
    def test_weights_above_the_stated_size_are_not_loaded(self, explored_run):
        model = ModelProcess(explored_run, 1e-6)
        try:
            with pytest.raises(RefusedRequest, match=r"GiB of weights: at most 1e-06 .* --model-gib 0\.\d+"):
                model.ask("model", b"")
        finally:
            model.close()

    def test_a_run_without_a_policy_says_so(self, run_at_work):
        model = ModelProcess(run_at_work.folder)
        try:
            with pytest.raises(RefusedRequest, match="policy"):
                model.ask("model", b"")
        finally:
            model.close()

    def test_one_that_was_killed_is_started_again(self, run):
        assert run.model.ask("model", b"")["num_codes"] == 8
        process, _ = run.model._started
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert run.model.ask("model", b"")["num_codes"] == 8
        run.model.close()
        assert process.poll() is not None and run.model._started is None


class TestCodes:
    def test_where_they_fire_is_what_the_policy_says(self, work):
        text = work.loaded.prompts[0].text
        found = work.fires(Fires(text=text))["tokens"]
        ids = torch.tensor([work.loaded.tokenizer(text)["input_ids"]])
        model = work.loaded.model
        with torch.no_grad():
            chances = torch.softmax(model.policy_logits(model.features(ids))[0, :-1].float(), -1)
        assert "codes" in found[0] and found[0]["codes"] == [] and len(found) == ids.shape[1]
        for place, token in enumerate(found[1:]):
            assert [c["code"] for c in token["codes"]] == chances[place].topk(5).indices.tolist()
            assert token["codes"][0]["chance"] == pytest.approx(float(chances[place].max()), rel=1e-4)
        with pytest.raises(RefusedRequest, match="give 2 to"):
            work.fires(Fires(text="3 " * 1200))

    def test_a_banned_code_is_not_used_and_a_forced_one_is(self, work):
        prompts = work.loaded.prompts[:20]
        free = work._answers(prompts, None)
        code = max(range(8), key=lambda k: sum(k in codes for _, _, codes in free))
        assert all(code not in codes for _, _, codes in work._answers(prompts, Ablation(code=code)))
        assert all(code in codes for _, _, codes in work._answers(prompts, Ablation(code=code, how="force")))
        found = work.ablate(Ablation(code=code, prompts=20))
        assert found["prompts"] == 20 and found["used"] == sum(code in codes for _, _, codes in free) > 0
        assert found["answers_changed"] > 0
        d = found["difference"]
        assert (
            d["mean"] == pytest.approx(found["success"][1] - found["success"][0]) and d["low"] <= d["mean"] <= d["high"]
        )
        assert len(found["flips"]) <= 6

    def test_what_cannot_be_done_is_refused(self, work):
        for asked, said in (
            (Ablation(code=8), "codes 0 to 7"),
            (Ablation(code=1, how="force", place=6), "up to 6 tokens"),
        ):
            with pytest.raises(RefusedRequest, match=said):
                work.ablate(asked)


class TestNotes:
    def test_they_are_kept_and_taken_away(self, tmp_path):
        assert read_notes(tmp_path) == {}
        keep_note(tmp_path, Note(about="code 3", text=" writes the target\n"))
        assert keep_note(tmp_path, Note(about="rollout a", text="odd")) == read_notes(tmp_path)
        assert read_notes(tmp_path) == {"code 3": "writes the target", "rollout a": "odd"}
        assert keep_note(tmp_path, Note(about="code 3", text=" ")) == {"rollout a": "odd"}

    def test_damage_and_masses_are_refused(self, tmp_path):
        (tmp_path / "notes.json").write_text(json.dumps({str(i): "x" for i in range(MOST_NOTES)}))
        with pytest.raises(RefusedRequest, match="the most there can be"):
            keep_note(tmp_path, Note(about="one more", text="x"))
        for text in ("{", "[]", '{"a": 1}'):
            (tmp_path / "notes.json").write_text(text)
            with pytest.raises(RefusedRequest, match="is damaged"):
                read_notes(tmp_path)


def post(address: str, body: Any, **headers: str) -> tuple[int, Any]:
    data = json.dumps(body).encode()
    request = urllib.request.Request(address, data, headers={"content-type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(request, timeout=BAR_SECONDS) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_the_service_answers_and_refuses(run, watching):
    address = watching(run.folder)
    api = f"{address}/api/runs/run"
    assert post(f"{api}/note", {"about": "code 1", "text": "mine"}) == (200, {"code 1": "mine"})
    assert read_notes(run.folder) == {"code 1": "mine"}
    with urllib.request.urlopen(f"{api}/notes", timeout=60) as reply:
        assert json.loads(reply.read()) == {"code 1": "mine"}
    for path, body, status, said in (
        ("note", {"about": "", "text": "x"}, 400, "about"),
        ("note", {"about": "a", "text": "x" * 2001}, 400, "text"),
        ("note", [], 400, ""),
        ("explain", {"rollout": "none"}, 404, "no rollout"),
        ("explain", {"rollout": 3}, 400, "rollout"),
        ("format", {}, 404, "not asked here"),
    ):
        found, reply = post(f"{api}/{path}", body)
        assert (found, said in reply["error"]["message"]) == (status, True), path
    assert post(f"{api}/note", {"about": "a", "text": "b"}, origin="http://evil.example")[0] == 403
    assert post(f"{address}/api/runs/none/note", {"about": "a", "text": "b"})[0] == 404


def test_the_explorers_page_is_served_live_and_steerings_beside_it(run, watching):
    address = watching(run.folder)
    with pytest.raises(urllib.error.HTTPError) as none:
        urllib.request.urlopen(f"{address}/runs/run/codes/", timeout=60)
    assert none.value.code == 404 and "latent-control explain" in none.value.read().decode()
    (run.folder / "explorer.html").write_text("<p>mine</p>")
    with pytest.raises(urllib.error.HTTPError) as other:
        urllib.request.urlopen(f"{address}/runs/run/codes/", timeout=60)
    assert "is not a page of the explorer" in other.value.read().decode()
    data = explore(run.folder, Explorer(seconds=0.0))[0]
    write_page([data], run.folder / "explorer.html")
    with urllib.request.urlopen(f"{address}/runs/run/codes/", timeout=60) as reply:
        text = reply.read().decode()
        assert "<body data-live>" in text and "connect-src 'self'" in text
    assert "data-live" not in (run.folder / "explorer.html").read_text().split("<script")[0]
    with urllib.request.urlopen(f"{address}/runs/run/steer/", timeout=60) as reply:
        assert "connect-src 'self'" in reply.read().decode() and reply.headers["content-security-policy"]
    status, answer = post(f"{address}/runs/run/steer/api/answer", {"prompt": "3 5 7 -> 15 :", "codes": [2]})
    assert status == 200 and answer["tokens"][0]["code"] == 2
