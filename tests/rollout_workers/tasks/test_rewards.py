"""Rewards in the open: weights by hand, hashes, the report on a buffer where the reward was gamed and on one where it
was not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from configs.loading import dump_config
from configs.schema import Reward, RunConfig, TaskConfig
from pipeline.cli.main import app
from pipeline.pages import reward_report
from pipeline.replay.reader import ReplayReader
from pipeline.replay.writer import ReplayWriter
from pipeline.rl.rollout_metrics import mean_parts
from rollout_workers.rollouts import Rollout, RolloutSummary
from rollout_workers.tasks import Prompt
from rollout_workers.tasks.countdown import Countdown
from rollout_workers.tasks.rewards import Response, judge, part_names, reward_hash, unknown_parts

PROBLEM = Prompt(id="countdown/train/0", text="3 7 25 -> 29 :", metadata={"numbers": (3, 7, 25), "target": 29})
MISSED = Response(text="25 + 3 = 28 , 28 + 7 = 35", new_tokens=12, limit=16, stopped=True)


def test_weights_add_up_by_hand_and_success_stays_the_verifiers() -> None:
    score = judge(Countdown(), Reward(weights={"format": 0.5, "length": 0.4, "stop": 2.0}), PROBLEM, MISSED)
    assert score.parts == {"success": 0.0, "format": 1.0, "length": -0.75, "stop": 1.0}
    assert score.reward == pytest.approx(0.5 - 0.3 + 2.0) and score.success is False
    assert judge(Countdown(), Reward(), PROBLEM, MISSED).reward == 0.0


def test_unknown_parts_are_named_with_those_there_are() -> None:
    assert part_names(Countdown(), Reward()) == ("success", "format", "length", "stop")
    (message,) = unknown_parts(Countdown(), Reward(weights={"fromat": 1.0, "stop": 1.0}))
    assert (
        message.startswith("reward.weights.fromat:")
        and "did you mean 'format'" in message
        and "success, format, length, stop" in message
    )


@pytest.mark.parametrize(("new_tokens", "part"), [(1, 0.0), (12, 0.0), (13, -0.25), (14, -0.5), (16, -1.0)])
def test_the_last_quarter_of_the_limit_costs(new_tokens: int, part: float) -> None:
    """Of 16 tokens the last 4 take a quarter each off the task's own reward, or their weight's share of it."""
    response = Response(text="25 + 7 = 32 , 32 - 3 = 29", new_tokens=new_tokens, limit=16, stopped=True)
    own = judge(Countdown(), Reward(overlong_share=0.25), PROBLEM, response)
    assert own.reward == pytest.approx(1.0 + part) and own.parts["overlong"] == pytest.approx(part) and own.success
    for weights, reward in (({"success": 2.0}, 2.0 + part), ({"success": 2.0, "overlong": 0.5}, 2.0 + part / 2)):
        found = judge(Countdown(), Reward(weights=weights, overlong_share=0.25), PROBLEM, response)
        assert found.reward == pytest.approx(reward)


def test_the_part_is_there_only_where_it_is_asked_for() -> None:
    assert unknown_parts(Countdown(), Reward(weights={"overlong": 1.0}, overlong_share=0.2)) == []
    (message,) = unknown_parts(Countdown(), Reward(weights={"overlong": 1.0}))
    assert message.startswith("reward.weights.overlong:")
    with pytest.raises(ValueError, match="'overlong' is not a part"):
        judge(Countdown(), Reward(weights={"overlong": 1.0}), PROBLEM, MISSED)
    assert reward_hash(TaskConfig(), Reward()) != reward_hash(TaskConfig(), Reward(overlong_share=0.2))


def test_hash_changes_with_task_options_and_weights_only() -> None:
    plain = reward_hash(TaskConfig(), Reward())
    assert len(plain) == 12 and plain == reward_hash(TaskConfig(chat=True), Reward())
    others = [(TaskConfig(options={"numbers": 4}), Reward()), (TaskConfig(), Reward(weights={"stop": 1.0}))]
    assert len({plain, *(reward_hash(task, reward) for task, reward in others)}) == 3
    assert reward_hash(TaskConfig(), Reward(weights={"a": 1, "b": 2})) == reward_hash(
        TaskConfig(), Reward(weights={"b": 2, "a": 1})
    )


def test_hash_of_rows_is_by_what_they_say_not_where_they_lie(tmp_path: Path) -> None:
    def hashed(name: str, answer: str) -> str:
        (tmp_path / name).write_text(f'{{"prompt": "2 + 2", "answer": "{answer}"}}')
        return reward_hash(TaskConfig(name="jsonl", options={"path": str(tmp_path / name)}), Reward())

    assert hashed("a.jsonl", "4") == hashed("b.jsonl", "4") != hashed("a.jsonl", "5")


def test_part_means_weigh_requests_by_their_judged_rollouts() -> None:
    base = RolloutSummary(
        request_id=0,
        worker=1,
        policies=(),
        rollouts=4,
        tokens=4,
        failures=1,
        rewards=(),
        successes=(),
        seconds=0.0,
        part_means={"stop": 1.0},
    )
    assert mean_parts([base, replace(base, rollouts=1, failures=0, part_means={"stop": 0.0})]) == {"stop": 0.75}
    assert mean_parts([replace(base, part_means={})]) == {}


def rollout(update: int, place: int, parts: Mapping[str, float], *, success: bool) -> Rollout:
    return Rollout(
        rollout_id=f"r{update}-{place}",
        group_id=f"g{update}",
        prompt_id="countdown/train/0",
        prompt_text="3 7 25 -> 29 :",
        text=f"<b>answer</b> {place}",
        prompt_tokens=np.array([1], np.int32),
        tokens=np.array([2], np.int32),
        actions=np.array([3], np.int32),
        action_logp=np.array([-1.0], np.float32),
        finish_reason="stop",
        reward=parts["format"],
        reward_parts=parts,
        success=success,
        failure=None,
        policy_version=update,
        policy_hash="p",
        world_hash="w",
        codebook_hash="c",
        level="latent",
        seed=0,
        worker=1,
        created=0.0,
        reward_hash="abc",
    )


def gamed(folder: Path, *, success_falls: bool) -> Path:
    """A run of 10 updates x 10 rollouts: ``format`` rises from 0 to 0.9; success falls from 0.9 to 0, or rises with
    it."""
    folder.mkdir()
    config = RunConfig(base={"model": "x"}, reward={"weights": {"format": 1.0}}, tracking={"enabled": False})
    (folder / "config.yaml").write_text(dump_config(config))
    writer = ReplayWriter(folder / "replay", 50, "a")
    for update in range(10):
        solved = 9 - update if success_falls else update
        writer.add(
            [
                rollout(update, i, {"format": float(i >= 10 - update), "constant": 1.0}, success=i < solved)
                for i in range(10)
            ]
        )
    writer.close()
    return folder


def test_report_flags_the_part_that_rises_while_success_falls(tmp_path: Path) -> None:
    level = reward_report.report(gamed(tmp_path / "run", success_falls=True))["levels"]["latent"]
    # A straight line from 0 to 0.9 over ten updates.
    assert level["trends"]["format"]["change"] == pytest.approx(0.9) and level["trends"]["success"][
        "change"
    ] == pytest.approx(-0.9)
    assert [(f["part"], f["paid"], f["success"]) for f in level["flags"]] == [
        ("format", True, "falls"),
        ("reward", True, "falls"),
    ]
    read = level["flags"][0]["rollouts"]
    assert (
        read
        and all(r["policy_version"] >= 7 and r["format"] == 1.0 for r in read)
        and len({r["text"] for r in read}) == len(read)
    )
    assert level["parts"]["format"]["mean"] == pytest.approx(0.45) and level["parts"]["format"][
        "share_at_max"
    ] == pytest.approx(0.45)
    assert level["correlations"]["constant"]["success"] is None and level["correlations"]["format"][
        "reward"
    ] == pytest.approx(1.0)
    assert level["reward_hashes"] == ["abc"]


def test_failures_are_counted_by_their_reason() -> None:
    rows = [
        {"success": False, "reward": 0.0, "reward_parts": {"format": 0.0}, "finish_reason": "stop", "text": f"t{i}"}
        for i in range(3)
    ]
    rows.append({"success": False, "reward": None, "reward_parts": {}, "finish_reason": "length", "text": "x"})
    rows[-1]["failure"] = "Timeout: 5 s"
    rows.append({"success": True, "reward": 1.0, "reward_parts": {"format": 1.0}, "finish_reason": "stop", "text": "y"})
    assert reward_report.reasons(rows, {"format": {"max": 1.0}}) == [
        ["format 0", "stop", "3", "t2"],
        ["verifier failed: Timeout: 5 s", "length", "1", "x"],
    ]


def test_sections_draw_distribution_and_course(tmp_path: Path) -> None:
    (section,) = reward_report.sections(reward_report.report(gamed(tmp_path / "run", success_falls=True)))
    figures = {figure.name: figure for figure in section.figures}
    assert sum(figures["distribution"].curves[0].y) == pytest.approx(1.0)
    assert figures["course-format"].curves[0].y == pytest.approx([i / 10 for i in range(10)])
    assert [table.title for table in section.tables][-1] == "Failures by the verifier's reason"
    assert sum(int(row[2]) for row in section.tables[-1].rows) == 55, "10 - (9 - update) of each update"
    assert section.galleries[0].total == len(section.galleries[0].examples) > 0


def test_flags_know_what_is_paid_and_show_it() -> None:
    """Repeats cost reward and fall, ``overlong`` is paid without a weight, and both are read where they pay most."""
    rows = [
        {
            "rollout_id": f"{update}-{i}", "prompt_text": "p", "text": f"{update}-{i}", "policy_version": update,
            "level": "latent", "finish_reason": "stop", "success": i < 2,
            "reward": update / 10, "reward_parts": {"overlong": update / 10 - 1, "repeats": 1 - update / 10 + i % 2},
        }
        for update in range(10) for i in range(8)
    ]  # fmt: skip
    told = {}
    for weights in ({"success": 1.0, "repeats": -0.1}, {"success": 1.0}, None):
        flags = {f["part"]: f for f in reward_report.report_of(rows, weights)["levels"]["latent"]["flags"]}
        told[str(weights and len(weights))] = {name: flag["paid"] for name, flag in flags.items()}
        if "repeats" in flags:
            assert "falls (its weight is negative)" in reward_report.sentence(flags["repeats"])
            assert [r["repeats"] for r in flags["repeats"]["rollouts"]] == pytest.approx([0.1] * 3 + [0.2] * 2)
    assert told == {
        "2": {"reward": True, "overlong": True, "repeats": True},
        "1": {"reward": True, "overlong": True},
        "None": {"reward": True, "overlong": True},
    }
    for row in rows:
        row["reward_parts"]["format"] = row["policy_version"]
    (flag,) = [f for f in reward_report.report_of(rows, None)["levels"]["latent"]["flags"] if f["part"] == "format"]
    assert flag["paid"] is None and "the task's own reward may count it" in reward_report.sentence(flag)


def test_report_is_silent_when_success_rises_too(tmp_path: Path) -> None:
    assert not reward_report.report(gamed(tmp_path / "run", success_falls=False))["levels"]["latent"]["flags"]


def test_command_prints_flags_and_writes_an_escaped_page(tmp_path: Path) -> None:
    run_dir = gamed(tmp_path / "run", success_falls=True)
    done = CliRunner().invoke(app, ["reward", "report", str(run_dir)])
    assert (
        done.exit_code == 0
        and "FLAG format rises by +0.900" in done.output
        and "perhaps the policy games it" in done.output
    )
    text = (run_dir / reward_report.PAGE).read_text()
    assert "\\u003cb\\u003eanswer" in text and "<b>answer" not in text and '"title":"format by update"' in text
    assert json.loads(CliRunner().invoke(app, ["reward", "report", str(run_dir), "--json"]).stdout)["weights"] == {
        "format": 1.0
    }
    assert CliRunner().invoke(app, ["reward", "report", str(tmp_path)]).exit_code == 2


def test_replay_keeps_the_hash(tmp_path: Path) -> None:
    rows = list(ReplayReader(gamed(tmp_path / "run", success_falls=True), columns=["reward_hash", "rollout_id"]).rows())
    assert len(rows) == 100 and {row["reward_hash"] for row in rows} == {"abc"}


def test_a_trend_is_the_fitted_line_over_the_span() -> None:
    trend = reward_report.trend([(1, 0.0), (2, 1.0), (3, 2.0)])
    assert trend.change == pytest.approx(2.0) and trend.low <= 2.0 <= trend.high
