"""Instructions that a program can check: each kind by hand, splits, contradictions, odd texts."""

from __future__ import annotations

from itertools import combinations

import pytest

from configs.schema import TaskConfig
from rollout_workers.tasks import Prompt, Score, build_task
from rollout_workers.tasks.instructions import ALONE, APART, CHECKS, KINDS, SEEN, Instructions, InstructionsOptions

TASK = Instructions()


def verdict(text: str, **wanted: object) -> Score:
    return TASK.score(Prompt(id="", text="", metadata={"wanted": wanted}), text)


@pytest.mark.parametrize(
    ("kind", "value", "right", "wrong"),
    [
        ("at_most", 10, "Bees are small, and they dance.", "one two three four five six seven eight nine ten eleven"),
        ("at_least", 5, "Bees are small and busy.", "Bees are small insects."),
        ("sentences", 2, "Bees dance all day. They live in hives!", "Bees dance all day, they live in hives."),
        ("include", "green", "The Green hills are near.", "The greenhouse hills are near."),
        ("without_letter", "b", "Wasps are yellow and quick.", "Wasps are yellow and Black."),
        ("lowercase", None, "bees are small insects.", "Bees are small insects."),
        ("starts_with", "Always", '"Always look at bees.', "We Always look at bees."),
        ("question", None, "Are the bees busy? \n", "Are the bees busy? Yes."),
        ("json", "cold", '{"cold": 1}', '{"warm": {"cold": 1}}'),
        ("uppercase", None, "BEES ARE SMALL, 1.", "BEES ARE small"),
        ("no_comma", None, "Bees are small and busy.", "Bees, they are small"),
        ("ends_with", "home", "The bees fly back Home.", "The bees fly home again."),
        ("bullets", 2, "Bees:\n- small ones\n - busy ones", "Bees - small\n- busy ones here"),
    ],
)
def test_each_kind(kind: str, value: object, right: str, wrong: str) -> None:
    assert verdict(right, **{kind: value}).success, right
    assert not verdict(wrong, **{kind: value}).success, wrong


def test_every_kind_has_a_check() -> None:
    assert KINDS.keys() == CHECKS.keys()


def test_the_reward_is_the_share_that_is_obeyed() -> None:
    found = verdict("Bees are small and green?", question=None, lowercase=None, include="green", at_least=20)
    assert (found.reward, found.success) == (0.5, False)
    assert verdict("small?", question=None, lowercase=None).reward == 0, "a text of one word is none"


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, "{" * 3000, "\ud800 \x00 a b c", "null null null null", "é " * 3000]
)
def test_odd_texts_are_judged(text: str) -> None:
    assert not verdict(text, json="cold").success
    for kind, value in {"at_most": 10, "sentences": 2, "bullets": 1, "ends_with": "home"}.items():
        assert 0 <= verdict(text, **{kind: value}).reward <= 1


def test_splits_share_no_topic_and_training_sees_seen_kinds_only() -> None:
    prompts = {split: [TASK.prompts(split)[n] for n in range(3000)] for split in ("train", "heldout")}
    topics = {split: {p.metadata["topic"] for p in found} for split, found in prompts.items()}
    assert topics["train"] and topics["heldout"] and not topics["train"] & topics["heldout"]
    kinds = {split: [set(p.metadata["wanted"]) for p in found] for split, found in prompts.items()}
    assert set().union(*kinds["train"]) == set(SEEN)
    assert all(
        bool(k - set(SEEN)) == (p.metadata["kinds"] == "unseen")
        for k, p in zip(kinds["heldout"], prompts["heldout"], strict=True)
    )
    assert 0.4 < sum(p.metadata["kinds"] == "unseen" for p in prompts["heldout"]) / 3000 < 0.6


@pytest.mark.parametrize("count", [1, 2, 3])
def test_no_prompt_contradicts_itself(count: int) -> None:
    task = Instructions(InstructionsOptions(count=count))
    for n in range(2000):
        for split in ("train", "heldout"):
            kinds = set(task.prompts(split)[n].metadata["wanted"])
            assert not any(set(pair) <= group for pair in combinations(kinds, 2) for group in APART)
            assert len(kinds) == count or kinds == ALONE


def test_options_are_checked() -> None:
    with pytest.raises(
        ValueError, match=r"task\.options\.count of instructions is 4; it must be a whole number from 1"
    ):
        build_task(TaskConfig(name="instructions", options={"count": 4}))
    with pytest.raises(ValueError, match="did you mean 'count'"):
        build_task(TaskConfig(name="instructions", options={"counts": 2}))
    with pytest.raises(ValueError, match="latent-control sample"):
        build_task(TaskConfig(name="instructions")).demonstrations("train")
