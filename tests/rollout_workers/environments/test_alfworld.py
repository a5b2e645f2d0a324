"""The adapter on ALFWorld's own engine, grammar and expert. Its data is not here: two households of its form, written
by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from configs.schema import TaskConfig
from rollout_workers.tasks import AgentTask, Score, build_task

found = find_spec("alfworld")
pytestmark = pytest.mark.skipif(found is None, reason="needs the package alfworld (docs/agents.md)")

HOUSEHOLDS = (("Apple", "DiningTable"), ("Mug", "Fridge"))
PROBLEM = """(define (problem household) (:domain alfred)
(:objects agent1 - agent loc_bar_1 loc_bar_2 loc_bar_3 - location Apple_bar_1 Mug_bar_1 - object
 Fridge_bar_1 DiningTable_bar_1 - receptacle
 FridgeType DiningTableType - rtype AppleType MugType - otype)
(:init (atLocation agent1 loc_bar_1) (receptacleAtLocation Fridge_bar_1 loc_bar_2)
 (receptacleAtLocation DiningTable_bar_1 loc_bar_3)
 (receptacleType Fridge_bar_1 FridgeType) (receptacleType DiningTable_bar_1 DiningTableType) (openable Fridge_bar_1)
 (objectType Apple_bar_1 AppleType) (objectType Mug_bar_1 MugType) (pickupable Apple_bar_1) (pickupable Mug_bar_1)
 (canContain DiningTableType AppleType) (canContain FridgeType MugType)
 (inReceptacle Apple_bar_1 Fridge_bar_1) (inReceptacle Mug_bar_1 DiningTable_bar_1)
 (objectAtLocation Apple_bar_1 loc_bar_2) (objectAtLocation Mug_bar_1 loc_bar_3) (= (total-cost) 0))
(:goal (exists (?r - receptacle) (exists (?o - object)
 (and (inReceptacle ?o ?r) (objectType ?o {thing}Type) (receptacleType ?r {place}Type)))))
(:metric minimize (total-cost)))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from alfworld.agents.utils.misc import add_task_to_grammar

    assert found is not None and found.origin is not None
    package = Path(found.origin).parent / "data"
    root = tmp_path_factory.mktemp("alfworld")
    for fold in ("train", "valid_seen", "valid_unseen"):
        for thing, place in HOUSEHOLDS:
            goal = {
                "object_target": thing,
                "parent_target": place,
                "object_sliced": False,
                "toggle_target": "",
                "mrecep_target": "",
            }
            trajectory = {"task_type": "pick_and_place_simple", "pddl_params": goal}
            game = {
                "pddl_domain": (package / "alfred.pddl").read_text(),
                "grammar": add_task_to_grammar((package / "alfred.twl2").read_text(), trajectory),
                "pddl_problem": PROBLEM.format(thing=thing, place=place),
            }
            folder = root / "json_2.1.1" / fold / f"pick_and_place_simple-{thing}-None-{place}-1" / "trial_1"
            folder.mkdir(parents=True)
            (folder / "traj_data.json").write_text(json.dumps(trajectory))
            (folder / "game.tw-pddl").write_text(json.dumps(game))
    return root


@pytest.fixture
def task(data: Path) -> Iterator[AgentTask]:
    made = build_task(TaskConfig(name="alfworld/all", options={"data": str(data)}))
    assert isinstance(made, AgentTask)
    yield made
    made.close()


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_experts_path_succeeds_and_is_shown_with_what_was_seen(task: AgentTask, split: str) -> None:
    for demo in (task.demonstrations(split)[0], task.demonstrations(split)[2]):  # type: ignore[arg-type]
        score = task.score(demo.prompt, "\n".join([demo.response, *(action for _, action in demo.later)]))
        assert isinstance(score, Score) and score.parts["success"] == score.parts["score"] == 1
    opening, later = task.demonstrations("train")[0].prompt.text, task.demonstrations("train")[0].later
    assert "you see a diningtable 1, and a fridge 1" in opening and "Your task is to:" in opening and "apple" in opening
    assert ("You open the fridge 1. The fridge 1 is open. In it, you see a apple 1.", "take apple 1 from fridge 1") in [
        (seen.strip().removesuffix("\n>").strip(), action.strip()) for seen, action in later
    ]


def test_no_success_without_the_task_done_and_nonsense_is_borne(task: AgentTask) -> None:
    prompt = task.prompts("train")[0]
    for text in ("go to fridge 1\nopen fridge 1\ntake apple 1 from fridge 1", "\x00 sing\n" * 3, "open fridge 1"):
        score = task.score(prompt, text)
        assert isinstance(score, Score) and score.parts["success"] == 0, score


def test_a_type_chooses_among_the_games(data: Path) -> None:
    task = build_task(TaskConfig(name="alfworld/pick_and_place", options={"data": str(data), "heldout": ["unseen"]}))
    assert isinstance(task, AgentTask) and task.prompts("heldout")[0].metadata == {"fold": "unseen", "number": 0}
    assert task.demonstrations("heldout")[0].response
    task.close()
