"""Diversity of responses: by hand, among solutions, at equal success; the embedder against a loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.evaluation.diversity import (
    at_equal_success,
    diversity,
    of_solutions,
    per_prompt_pairs,
    prompt_cosines,
    solutions,
)
from pipeline.stages.embedding import embed

pytest_plugins = ("rl_fixtures",)
VECTORS = {"x": [1.0, 0.0], "y": [0.0, 1.0], "xy": [1.0, 1.0]}
RESPONSES = [["x", "y"], ["x", "xy", "x"], ["x"]]


def look_up(texts: Sequence[str]) -> np.ndarray:
    assert len(set(texts)) == len(texts), "each text is embedded once"
    return np.array([VECTORS[text] for text in texts])


def test_semantic_diversity_by_hand() -> None:
    half = 2**-0.5
    cosines = prompt_cosines(RESPONSES, look_up)
    assert cosines[:2] == pytest.approx([0.0, (1 + 2 * half) / 3])
    assert np.isnan(cosines[2])
    found = diversity(RESPONSES, 0, cosines)
    assert found["semantic_diversity"] == pytest.approx(1 / ((1 + 2 * half) / 6))
    assert found["semantic_diversity_interval"] is None, "a resample of the orthogonal prompt alone has cosine 0"
    assert found["differing_pairs"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["distinct_responses"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["distinct_1"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["distinct_2"] is None, "one-word responses have no pairs"


def test_identical_responses_have_diversity_one() -> None:
    same = [["x y", "x y"], ["y x", "y x"]]
    found = diversity(same, 0, prompt_cosines(same, lambda texts: np.ones((len(texts), 3))))
    assert found["semantic_diversity"] == pytest.approx(1.0)
    assert found["semantic_diversity_interval"] is None, "two prompts that do not differ say nothing of others"
    assert (found["differing_pairs"], found["distinct_2"]) == (0.0, 0.5)


def test_solutions_alone() -> None:
    marks = [[True, True], [True, False, True], [True]]
    solved = solutions(RESPONSES, marks)
    assert solved == [["x", "y"], ["x", "x"], ["x"]]
    found = of_solutions(solved, 0, prompt_cosines(solved, look_up))
    assert found["differing_pairs_successful"] == 0.5
    assert found["pairwise_cosine_successful"] == pytest.approx(0.5)
    assert found["semantic_diversity_successful"] == pytest.approx(2.0)
    assert {"differing_pairs_successful_interval", "prompts_with_two_successes"} <= found.keys()
    assert found["prompts_with_two_successes"] == 2
    assert of_solutions([["x"], []], 0, None) == {"prompts_with_two_successes": 0}


def test_equal_success_looks_at_the_prompts_both_solved_twice() -> None:
    ours = {"pairs": per_prompt_pairs([["a", "b"], ["a", "a"], ["a", "b"], ["a"]])}
    theirs = {"pairs": per_prompt_pairs([["a", "a"], ["a", "a"], ["a"], ["a", "b"]])}
    found = at_equal_success(ours, theirs, seed=0)["pairs"]
    assert (found["mean"], found["prompts"]) == (0.5, 2)
    assert at_equal_success({"pairs": np.array([np.nan])}, {"pairs": np.array([1.0])}, seed=0) == {}


def test_embeddings_are_mean_pooled_without_padding(tiny_base: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    texts = ["3 7 25 -> 29 :", "", "25 - 3 = 22 , 22 + 7 = 29"]
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_base), AutoModel.from_pretrained(tiny_base)
    found = embed(texts, str(tiny_base))
    for place, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            wanted = (
                model(torch.tensor([ids])).last_hidden_state[0].mean(0).numpy() if ids else np.zeros(found.shape[1])
            )
        assert found[place] == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(ValueError, match=r"evaluation\.embedder"):
        embed(texts, str(tiny_base / "absent"))
