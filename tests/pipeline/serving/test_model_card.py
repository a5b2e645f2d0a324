"""The model card of an export: the hub's own reader reads it, its numbers are the evaluation's, and what users and
base LMs name cannot write into it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from configs.loading import load_config
from pipeline.cli.main import app
from pipeline.serving.model_card import base_licence, model_card

pytest_plugins = ("rl_fixtures",)
SHAPE = SimpleNamespace(num_actions=64, span=1)
HOSTILE = "a|b`\n---\nlicense: mit\n# <script>alert(1)</script>"


def about(**changes: Any) -> dict[str, Any]:
    row = {"sampled": 0.59, "sampled_interval": [0.529, 0.648], "greedy": 0.602, "greedy_interval": [0.541, 0.66]}
    evaluation = {"prompts": 256, "improved": {**row, "greedy_token": 0.7, "greedy_token_interval": [0.64, 0.75]}}
    return {
        "run": "first",
        "checkpoint": "improve",
        "base": {"name": "SmolLM2", "sha256": "ab" * 32},
        "replay_sha256": None,
        "exported_by": "c0ffee",
        "evaluation": evaluation,
        "config": json.loads(load_config("countdown").model_dump_json()),
    } | changes


def test_the_hub_reads_base_and_numbers_with_their_decoding() -> None:
    card = ModelCard(model_card(about(), "org/some-model-that-is-not-here", SHAPE))
    assert card.data.base_model == "org/some-model-that-is-not-here"
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    found = {(one.metric_name, one.metric_value) for one in card.data.eval_results}
    assert found == {
        ("success of improved, sampled", 0.59),
        ("success of improved, greedy", 0.602),
        ("success of improved, greedy by token", 0.7),
    }
    assert {one.dataset_name for one in card.data.eval_results} == {"countdown"}
    assert "| improved | greedy by token | 0.700 | 0.640 - 0.750 |" in card.text
    assert "Success on 256 held-out prompts of countdown, with 95 % intervals." in card.text
    assert "64 codes, one per token" in card.text and "improve (grpo), 150 updates" in card.text


def test_a_checkpoint_outside_of_a_run_has_a_card_that_claims_nothing() -> None:
    card = ModelCard(model_card(about(run=None, evaluation=None, config=None), "/nowhere", SHAPE))
    assert "The run was not evaluated." in card.text and "unknown: not exported from a run" in card.text
    assert card.data.eval_results is None and card.data.base_model is None and card.data.license is None


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# M\n", "apache-2.0"),
        ("---\r\nlicense: mit\r\n---", "mit"),
        ("# no header\nlicense: mit\n", ""),
        ("---\nlicense: [mit]\n---\n", ""),
        ("---\nlicense: 'x\\n# y'\n---\n", ""),
        ("---\nlicense: &a [*a]\n---\n", ""),
        ("---\n- 1\n---\n", ""),
        ("", ""),
    ],
)
def test_the_licence_is_what_the_bases_card_names(text: str, licence: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(text.encode())
    assert base_licence(str(tmp_path)) == licence
    if licence:
        assert ModelCard(model_card(about(), str(tmp_path), SHAPE)).data.license == licence


def test_no_card_and_no_folder_are_no_licence(tmp_path: Path) -> None:
    assert base_licence(str(tmp_path)) == base_licence("org/some-model-that-is-not-here") == ""


def test_names_write_nothing_into_it() -> None:
    card = ModelCard(model_card(about(run=HOSTILE, base={"name": HOSTILE, "sha256": "0"}), "/nowhere", SHAPE))
    assert card.data.license is None and "<script" not in card.content
    assert all(line.count("|") in (0, 3, 5) for line in card.text.splitlines())


def test_every_export_has_one(finished_run: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["export", str(finished_run), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.text.lstrip().startswith("# first on ")
