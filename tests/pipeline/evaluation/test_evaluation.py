"""The evaluation's numbers from outcomes, by hand, and what goes wrong before anything starts; whole evaluations:
test_run.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from configs.schema import Evaluation, RunConfig
from pipeline.evaluation import results
from pipeline.evaluation.outcomes import Mode, Outcome
from pipeline.evaluation.results import Played
from pipeline.evaluation.statistics import exact_interval
from pipeline.stages import play
from pipeline.stages.text_likelihood import measure
from rollout_workers.rollouts import HostSpec
from rollout_workers.tasks import Prompt

pytest_plugins = ("rl_fixtures",)


def outcomes(mode: Mode, marks: list[str]) -> list[Outcome]:
    """``marks``: per prompt a text of responses, a capital letter is a success, "?" a response that could not be
    judged."""
    return [
        Outcome(
            variant="x",
            mode=mode,
            prompt_id=f"t/heldout/{prompt}",
            sample=sample,
            success=letter.isupper(),
            reward=None if letter == "?" else float(letter.isupper()),
            reward_parts={},
            response=letter,
            prompt="q",
            new_tokens=2 + sample,
        )
        for prompt, letters in enumerate(marks)
        for sample, letter in enumerate(letters)
    ]


def test_numbers_of_several_samples_by_hand() -> None:
    played = Played(
        sampled=outcomes("sampled", ["AA", "Ab", "b?", "AB"]), greedy=outcomes("greedy", ["A", "A", "b", "b"])
    )
    settings = Evaluation(samples_per_prompt=2, pass_at=(1, 2), slice_minimum=2)
    found = results.variant_numbers(played, settings, 0, None, {"half": ["first", "first", "last", "last"]})
    assert (found["sampled"], found["greedy"]) == (5 / 8, 0.5)
    assert (found["pass_at_1"], found["pass_at_2"]) == (5 / 8, 0.75)
    assert found["greedy_interval"] == exact_interval(2, 4)
    assert found["sampled_interval"] == exact_interval(2.5, 4), "over prompts"
    assert (found["sampled_tokens"], found["greedy_tokens"], found["sampled_failures"]) == (2.5, 2.0, 1)
    assert found["differing_pairs"] == 0.75
    assert (found["differing_pairs_successful"], found["prompts_with_two_successes"]) == (0.5, 2)
    assert (found["slice_gap"], found["slice_gap_greedy"]) == (0.25, 1.0)
    assert "semantic_diversity" not in found


def test_one_sample_each_is_as_before() -> None:
    played = Played(sampled=outcomes("sampled", ["A", "b", "b", "b"]), greedy=outcomes("greedy", ["A", "A", "b", "b"]))
    found = results.variant_numbers(played, Evaluation(), 0, None, {})
    assert found["sampled_interval"] == exact_interval(1, 4)
    assert set(found) == {
        f"{mode}{name}" for mode in ("sampled", "greedy") for name in ("", "_interval", "_tokens", "_failures")
    }


def test_differences_are_paired_and_diversity_is_compared_at_equal_success() -> None:
    greedy = outcomes("greedy", ["A", "b"])
    played = {
        "base": Played(sampled=outcomes("sampled", ["AA", "bb"]), greedy=greedy),
        "improved": Played(sampled=outcomes("sampled", ["AB", "CD"]), greedy=greedy),
    }
    cosines = {"base": (np.ones(2), np.array([1.0, np.nan])), "improved": (np.ones(2), np.array([0.25, 0.5]))}
    found = results.differences(played, 2, cosines, 0)["improved - base"]
    assert found["sampled"]["mean"] == 0.5
    # Two prompts, none of which differs: (1 - psi)^2 = 0.025.
    assert found["greedy"] == pytest.approx({"mean": 0.0, "low": 0.025**0.5 - 1, "high": 1 - 0.025**0.5})
    # One prompt, which differs: theta is at least 0.025.
    assert found["differing_pairs_successful"] == pytest.approx({"mean": 1.0, "low": -0.95, "high": 1.0, "prompts": 1})
    assert found["pairwise_cosine_successful"]["mean"] == -0.75
    assert results.differences({"base": played["base"]}, 2, {}, 0) == {}


def test_an_unknown_slice_ends_it_before_anything_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(play, "connected", lambda _: pytest.fail("Ray was started"))
    config = RunConfig(base={"model": "x"}, evaluation={"slices": ["targets"]})
    with pytest.raises(ValueError, match=r"did you mean target\? the fields there are: numbers, target"):
        play.evaluate(config, {"base": HostSpec(level="base", checkpoint="x")}, prompts=4, say=print)


def test_slices_of_the_prompts_that_are_played() -> None:
    prompts = [
        Prompt(id=str(i), text="q", metadata={"kind": "ab"[i % 2]} | ({"late": 1} if i > 3 else {})) for i in range(6)
    ]
    assert results.slices_of(Evaluation(slices=("kind",)), prompts, 3) == {"kind": ["a", "b", "a"]}
    with pytest.raises(ValueError, match="late"):
        results.slices_of(Evaluation(slices=("late",)), prompts, 3)


def test_a_task_without_demonstrations_gives_a_note_and_a_bad_text_source_an_error(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt longer than ``max_length`` leaves no demonstration to read; in this process, without Ray's task."""
    monkeypatch.setattr(play, "measure_texts", measure)
    hosts = {"base": HostSpec(level="base", checkpoint=str(tiny_base))}
    config = RunConfig(base={"model": str(tiny_base)}, actions={"max_length": 3})
    measured, notes = play._texts(config, hosts)
    assert measured == {}
    assert notes[0].startswith(
        "NLL, retention and codebook health were not measured: demonstration countdown/heldout/0: its prompt has"
    )
    asked = config.model_copy(update={"evaluation": Evaluation(retention={"kind": "task"})})
    with pytest.raises(ValueError, match="its prompt has"):
        play._texts(asked, hosts)
