"""Worlds in child processes: deadlines, replays, errors; the adapters, as far as their libraries are here."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from configs.schema import TaskConfig
from rollout_workers.environments import family
from rollout_workers.environments.client import Lost, Worlds
from rollout_workers.environments.protocol import Step
from rollout_workers.tasks import AgentTask, Failure, Score, build_task

TOY = "environment/toy_world:Keys"
SEEDS = [{"seed": seed} for seed in range(4)]
OPENINGS = ["room 3 . key 1 .", "room 2 . key 1 .", "room 3 . key 0 .", "room 2 . key 0 ."]


@pytest.fixture
def worlds() -> Iterator[Any]:
    made: list[Worlds] = []

    def make(name: str = TOY, options: dict[str, Any] | None = None, **settings: Any) -> Worlds:
        made.append(Worlds(name, options or {}, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_world_resets_steps_and_ends(worlds: Any) -> None:
    some = worlds()
    assert some.begin(SEEDS[:2]) == OPENINGS[:2]
    assert some.gold(0) == ["go left", "go left", "take key"]
    assert some.step({0: "go left", 1: "go left"}) == {
        0: Step(observation="room 2 . key 1 .", reward=0.0),
        1: Step(observation="room 1 . key 1 .", reward=0.25),
    }
    assert some.step({1: "take key"}) == {1: Step(observation="taken .", reward=0.75, terminated=True, success=True)}
    assert some.begin(SEEDS[:2]) == OPENINGS[:2]  # nothing is left of what was done
    assert some.step({1: "take key"})[1].observation == "nothing ."


@pytest.mark.parametrize("processes", [1, 3])
def test_how_many_processes_there_are_does_not_matter(worlds: Any, processes: int) -> None:
    some = worlds(processes=processes)
    assert some.begin(SEEDS) == OPENINGS
    outcomes = some.step(dict.fromkeys(range(4), "go left"))
    seen = ["room 2 . key 1 .", "room 1 . key 1 .", "room 2 . key 0 .", "room 1 . key 0 ."]
    assert [outcomes[i].observation for i in range(4)] == seen
    assert len({child.process.pid for child in some.children}) == processes


def test_a_step_that_hangs_is_lost_alone_and_in_time(worlds: Any) -> None:
    some = worlds(step_seconds=1.0)
    some.begin(SEEDS[:3])
    some.step({0: "go left", 1: "go left", 2: "go left"})
    first = some.children[0].process
    started = time.monotonic()
    outcomes = some.step({0: "go left", 1: "wait 60", 2: "go left"})
    assert time.monotonic() - started < 10
    assert outcomes[1] == Lost(kind="environment_timeout", message="no answer to step 'wait 60' within 1 s")
    assert outcomes[0].observation == "room 1 . key 1 ."
    assert outcomes[2].observation == "room 1 . key 0 ."  # replayed: it had been in room 2
    assert first.poll() is not None and some.children[0].process is not first
    assert some.step({0: "take key"})[0].success  # so had episode 0


def test_a_world_that_dies_or_raises_is_lost(worlds: Any) -> None:
    some = worlds()
    some.begin(SEEDS[:2])
    assert some.step({0: "crash"})[0] == Lost(kind="environment_error", message="LookupError: crashed")
    pid = some.children[0].process.pid
    assert some.step({1: "go left"})[1].reward == 0.25
    assert some.children[0].process.pid == pid  # an exception ends nothing
    assert some.step({0: "die"})[0] == Lost(kind="environment_lost", message="the environment's process has ended (3)")
    assert some.step({1: "take key"})[1].success


def test_a_reset_that_hangs_or_fails_says_so(worlds: Any) -> None:
    with pytest.raises(
        ValueError,
        match=r"toy_world:Keys cannot begin {'seed': 0}: no answer to reset '' within 0.2 "
        r"s",
    ):
        worlds(options={"delay": 60.0}, reset_seconds=0.2).begin(SEEDS[:1])
    with pytest.raises(ValueError, match=r"cannot begin {}: KeyError: 'seed'"):
        worlds().begin([{}])


def test_the_child_goes_with_its_parent(worlds: Any) -> None:
    some = worlds()
    some.begin(SEEDS[:1])
    process = some.children[0].process
    process.stdin.write(b'{"slot": 0, "call": "step", "text": "wait 60"}\n')
    process.stdin.close()  # as when the parent is killed, while the world hangs
    assert process.wait(10) == 0


def test_a_world_as_a_task() -> None:
    task = build_task(TaskConfig(name=TOY))
    assert isinstance(task, AgentTask)
    prompt = task.prompts("train")[0]
    assert (prompt.id, prompt.metadata) == (f"{TOY}/train/0", {"fold": "train", "seed": 0})
    demo = task.demonstrations("train")[0]
    assert (demo.prompt.text, demo.response) == ("room 3 . key 1 .\n>", "go left")
    assert demo.later == (("room 2 . key 1 .\n>", "go left"), ("room 1 . key 1 .\n>", "take key"))
    parts = {"success": 1.0, "score": 1.0, "turns": -3.0, "truncated": 0.0}
    assert task.score(prompt, "go left\ngo left\ntake key\ngo left") == Score(reward=1.0, success=True, parts=parts)
    parts = {"success": 0.0, "score": 0.25, "turns": -2.0, "truncated": 1.0}
    assert task.score(prompt, "go left\ngo left") == Score(reward=0.25, success=False, parts=parts)
    assert task.score(prompt, "crash") == Failure(kind="environment_error", message="LookupError: crashed")
    assert {"room", "key", "go", "left", "right", "take", ">", ".", "0", "3"} <= set(task.words)
    task.close()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("textworld_express", {}, "say which one: textworld_express/..."),
        ("textworld_express/chess", {}, "has no game 'chess'"),
        (
            "textworld_express/coin",
            {"gane": {}},
            "task.options.gane is not an option of textworld_express; known: game, heldout, slip",
        ),
        ("textworld_express/coin", {"heldout": ["tset"]}, "name some of train, dev, test"),
        ("scienceworld/boil", {"heldout": ["train"]}, "name some of dev, test"),
        ("environment/nowhere:Keys", {}, "importable here: No module named 'nowhere'"),
        ("textworld_expres/coin", {}, "did you mean 'textworld_express/<which>'?"),
    ],
)
def test_wrong_names_and_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        build_task(TaskConfig(name=name, options=options))
    assert message in str(error.value)


def test_gymnasium_environments_are_played_in_words(worlds: Any) -> None:
    task = build_task(
        TaskConfig(name="gymnasium/Keys-v0", options={"modules": ["toy_world"], "instruction": "Take it."})
    )
    demo = task.demonstrations("train")[0]
    assert demo.prompt.text == "Take it.\nroom 3 . key 1 .\n>"
    assert demo.later[-1] == ("room 1 . key 1 .\n>", "take key")
    verdict = task.score(demo.prompt, "go left\ngo left\ntake key")
    assert isinstance(verdict, Score) and verdict.success and verdict.reward == 1.0
    lake = worlds(
        "gymnasium/FrozenLake-v1", {"actions": ["left", "down", "right", "up"], "settings": {"is_slippery": False}}
    )
    assert lake.begin([{"seed": 1}]) == ["0"]
    assert lake.step({0: "down"})[0].observation == "4"
    assert lake.step({0: "fly"})[0].observation == "Nothing happens. You can: left, down, right, up."
    with pytest.raises(ValueError, match="has no gold path"):
        build_task(TaskConfig(name="gymnasium/FrozenLake-v1", options={"actions": ["left"]})).demonstrations("train")[0]


def test_alfworld_without_its_data_says_what_to_do(worlds: Any) -> None:
    with pytest.raises(ValueError, match="run alfworld-download"):
        worlds("alfworld/all", {"data": "nowhere"}).begin([{"fold": "train", "number": 0}])


@pytest.mark.parametrize("name", ["textworld_express/twc", "scienceworld/boil,melt", "alfworld/all"])
def test_held_out_episodes_are_others_and_folds_take_turns(name: str) -> None:
    kind = family(name, {})
    train, heldout = ({str(dict(e)) for e in kind.episodes(split)[:60]} for split in ("train", "heldout"))  # type: ignore[arg-type]
    assert len(train) == len(heldout) == 60 and not train & heldout
    assert len({e["fold"] for e in kind.episodes("heldout")[:4]}) == 2


def java(package: str) -> pytest.MarkDecorator:
    reason = f"{package} is not installed" if find_spec(package) is None else "there is no java"
    return pytest.mark.skipif(find_spec(package) is None or shutil.which("java") is None, reason=reason)


@java("textworld_express")
def test_textworld_express_gold_paths_succeed_in_one_machine() -> None:
    task = build_task(
        TaskConfig(name="textworld_express/twc", options={"game": {"numLocations": 1, "numItemsToPutAway": 1}})
    )
    for place in (0, 1):
        demo, prompt = task.demonstrations("heldout")[place], task.prompts("heldout")[place]
        assert demo.prompt.text.startswith("Your task is to pick up objects") and demo.prompt.text.endswith("\n>")
        verdict = task.score(prompt, "\n".join([demo.response, *(response for _, response in demo.later)]))
        assert isinstance(verdict, Score) and verdict.success and verdict.reward == pytest.approx(1.0)
    assert isinstance(task, AgentTask)
    pair = task.worlds
    openings = pair.begin([{"fold": "train", "seed": 0}, {"fold": "train", "seed": 1}])
    assert openings[0] != openings[1]
    outcomes = pair.step({0: "look around", 1: "look around"})
    assert all(outcomes[i].observation in openings[i] for i in range(2))  # neither has become the other
    task.close()


@java("scienceworld")
def test_scienceworld_gold_path_succeeds() -> None:
    task = build_task(TaskConfig(name="scienceworld/find-living-thing", options={"simplifications": "easy"}))
    demo, prompt = task.demonstrations("heldout")[0], task.prompts("heldout")[0]
    assert demo.prompt.text.startswith("Task Description")
    verdict = task.score(prompt, "\n".join([demo.response, *(response for _, response in demo.later)]))
    assert isinstance(verdict, Score) and verdict.success and verdict.reward == pytest.approx(1.0)
