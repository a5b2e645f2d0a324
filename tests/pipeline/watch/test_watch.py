"""The service of ``watch``: what it says of a run at work, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import numpy as np
import pytest
from explorer_data import HOSTILE
from typer.testing import CliRunner

from configs.schema import RunConfig
from pipeline.cli.main import app
from pipeline.pages.report.curves import band, learning_curves
from pipeline.pages.report.sources import read_sources
from pipeline.watch.followed_run import FollowedRun, FollowedRuns
from pipeline.watch.time_spent import METRICS, time_spent
from pipeline.watch.token_texts import token_texts

pytest_plugins = ("watch_fixtures",)
ROOT = Path(__file__).resolve().parents[3]


def get(address: str, path: str = "", method: str = "GET", **headers: str) -> tuple[int, Any, Any]:
    """(status, what came back, headers)."""
    request = urllib.request.Request(address + path, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            text = reply.read().decode()
            return reply.status, json.loads(text) if "/api/" in address + path else text, reply.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), error.headers


def events(address: str, name: str = "first") -> Iterator[tuple[str, Any]]:
    with urllib.request.urlopen(f"{address}/api/runs/{name}/events", timeout=60) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        kind = ""
        for line in reply:
            kind = line.decode().removeprefix("event: ").strip() if line.startswith(b"event: ") else kind
            if line.startswith(b"data: "):
                yield kind, json.loads(line.removeprefix(b"data: "))


def next_of(stream: Iterator[tuple[str, Any]], kind: str) -> Any:
    return next(data for name, data in stream if name == kind)


class TestStream:
    def test_what_is_new_comes_within_five_seconds(self, run_at_work, watching):
        stream = events(watching(run_at_work.folder.parent))
        assert next_of(stream, "curves") == []
        run_at_work.update()
        run_at_work.update()
        began = time.monotonic()
        reward = next_of(stream, "curves")[0]
        assert time.monotonic() - began < 5
        assert (reward["title"], reward["across"]) == ("Reward of training rollouts", "update")
        assert reward["curves"][0]["raw"] == [[1.0, 0.01], [2.0, 0.02]]
        assert next_of(stream, "rollouts") == {"total": 8}
        run_at_work.update()
        state = next_of(stream, "state")
        while state["step"] < 3:
            state = next_of(stream, "state")
        assert (state["stage"], state["updates"], state["reward"], state["pages"]) == ("improve", 50, 0.03, [])
        assert state["status"] == "interrupted"  # no process works on it
        (run_at_work.folder / "report.html").write_text("<p>page</p>")
        while "report.html" not in state["pages"]:
            state = next_of(stream, "state")

    def test_a_run_that_cannot_be_read_says_why_and_comes_back(self, run_at_work, watching):
        run_at_work.update()
        config, outcomes = run_at_work.folder / "config.yaml", run_at_work.folder / "evaluation.parquet"
        text = config.read_bytes()
        config.write_bytes(b"base: [")
        stream = events(watching(run_at_work.folder.parent))
        assert "config.yaml: not valid YAML" in next_of(stream, "unread")
        config.write_bytes(text)
        assert next_of(stream, "state")["step"] == 1
        outcomes.write_bytes(b"half of it")
        assert "evaluation.parquet is not an evaluation file" in next_of(stream, "unread")
        outcomes.unlink()
        assert next_of(stream, "curves") and next_of(stream, "state")["step"] == 1
        shutil.rmtree(run_at_work.folder)
        assert next_of(stream, "unread").startswith("there is no run 'first'")
        run_at_work.folder.mkdir()
        config.write_bytes(text)  # another one of this name
        assert next_of(stream, "curves") == []

    def test_a_damaged_shard_stays_where_it_is(self, run_at_work, watching):
        for _ in range(2):
            run_at_work.update()
        run_at_work.replay.close()
        (shard,) = run_at_work.folder.glob("replay/run=*/part-*.parquet")
        shard.write_bytes(shard.read_bytes()[:100])
        address = watching(run_at_work.folder)
        for part in ("result", "cost"):
            assert get(address, f"/api/runs/first/{part}")[0] == 200
        assert shard.is_file() and not (run_at_work.folder / "replay/_quarantine").exists()

    def test_its_curves_are_the_reports(self, run_at_work):
        for _ in range(40):
            run_at_work.update()
        run = FollowedRun(run_at_work.folder)
        run.poll()
        assert learning_curves(run) == learning_curves(read_sources(run_at_work.folder))
        assert {figure["name"] for figure in json.loads(run.parts["curves"])} >= {"reward", "heldout", "entropy"}

    def test_its_band_is_students(self):
        mean, low, high = band(np.array([1.0, 2.0, 3.0, 10.0]), 1)
        assert mean == pytest.approx([1.5, 2.0, 5.0, 6.5])
        # 2 values, sd 0.7071, t = 12.706; 3 values, sd 1, t = 4.3027
        assert high[:2] - mean[:2] == pytest.approx([12.7062 * 0.5, 4.30265 / 3**0.5], rel=1e-5)
        assert mean - low == pytest.approx(high - mean)
        assert band(np.full(5, 0.1), 2)[0] == pytest.approx([0.1] * 5)


class TestTime:
    def test_an_update_is_split_by_hand(self, run_at_work):
        for _ in range(3):
            run_at_work.update(seconds_heldout=4.0)
        run = FollowedRun(run_at_work.folder)
        run.poll()
        (found,) = time_spent(run)
        # 1 s of waiting, a quarter of the workers' time being the verifier's; 2 - 1 - 0.5 - 0.25 is not measured
        wanted = {
            "sampling": 0.75,
            "verifying": 0.25,
            "updating": 0.5,
            "publishing": 0.25,
            "idle": 0.0,
            "other": 0.25,
            "held-out evaluation": 4.0,
        }
        (figure,), (table,) = found.figures, found.tables
        assert figure.labels == ["1", "2", "3"] and figure.stacked
        assert found.lines[0].startswith("Its updates took 18s") and "50% of the time" in found.lines[1]
        assert {curve.name: curve.y[1] for curve in figure.curves} == pytest.approx(wanted)
        assert [row[:2] for row in table.rows] == [[name, f"{3 * value:.1f}"] for name, value in wanted.items()]

    def test_an_asynchronous_learner_idles_and_bars_are_means(self):
        class Run:
            config = RunConfig(base={"model": "x"})

            def series(self, stage, metric):
                values = {"seconds_update_total": 2.0, "seconds_waiting": 1.5, "seconds_updating": 0.5}
                there = stage == "improve" and metric in values
                steps = np.arange(1.0, 101.0) if there else np.empty(0)
                return steps, np.full(len(steps), values.get(metric, 0.0))

        (found,) = time_spent(Run())
        assert len(found.figures[0].labels) == 40 and found.figures[0].labels[-1] == "100" and len(found.lines) == 1
        drawn = {curve.name: set(curve.y) for curve in found.figures[0].curves}
        assert drawn["idle"] == {1.5} and drawn["other"] == {0.0}
        assert "seconds_waiting" in METRICS


class TestRollouts:
    def test_search_and_groups(self, run_at_work, watching):
        for text in ("7 + 3 = 10", "7 * 3 = 21", "stop"):
            run_at_work.update(text)
        run = f"{watching(run_at_work.folder)}/api/runs/first"
        query = urlencode({"text": r"= \d\d of", "regex": 1, "success": "good"})
        status, found, _ = get(run, f"/rollouts?{query}")
        assert status == 200 and [row["rollout_id"] for row in found["rows"]] == ["r1-3", "r0-3"]
        assert (found["total"], found["kept"], found["stored"]) == (2, 12, 12)
        row = found["rows"][0]
        assert row["actions"] == [0, 5, 3] and row["pieces"][0] == row["pieces"][2] == "3"
        assert row["reward_parts"] == {"success": 1.0, HOSTILE: 0.5}
        assert get(run, "/rollouts?least=0.5&first=2&finish=stop")[1]["total"] == 1
        assert [row["rollout_id"] for row in get(run, "/rollouts?at=10")[1]["rows"]] == ["r0-1", "r0-0"]
        group = get(run, "/group?id=g1")[1]
        assert {row["rollout_id"]: row["advantage"] for row in group} == {
            "r1-0": -0.25,
            "r1-1": -0.25,
            "r1-2": -0.25,
            "r1-3": 0.75,
        }
        assert group[1]["failure"] == f"Timeout: {HOSTILE}"
        assert get(run, "/group?id=none")[1] == []

    @pytest.mark.parametrize(
        ("query", "status", "said"),
        [
            ("text=(&regex=1", 400, "not a regular expression"),
            (f"text={'a' * 401}", 400, "text"),
            ("success=maybe", 400, "success"),
            ("least=nan", 400, "least"),
            ("least=x", 400, "least"),
            ("first=-1", 400, "first"),
            ("at=1e9", 400, "at"),
        ],
    )
    def test_what_is_wrong_with_a_search_is_said(self, run_at_work, watching, query, status, said):
        found, reply, _ = get(watching(run_at_work.folder), f"/api/runs/first/rollouts?{query}")
        assert found == status and said in reply["error"]["message"]

    def test_texts_of_tokens_need_a_tokenizer_of_this_machine(self, tmp_path):
        assert token_texts(str(ROOT / "configs/models/countdown-1m"))([7, 7]) == ["3", "3"]
        for base in (str(tmp_path), "nobody/nothing", "a/b/c"):
            with pytest.raises(ValueError, match=r"there is no tokenizer\.json"):
                token_texts(base)
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(ValueError, match="is not a tokenizer"):
            token_texts(str(tmp_path))


class TestService:
    def test_runs_of_a_folder_the_newest_first(self, run_at_work, watching):
        other = run_at_work.folder.with_name("second")
        other.mkdir()
        (other / "config.yaml").write_bytes((run_at_work.folder / "config.yaml").read_bytes())
        os.utime(run_at_work.folder / "config.yaml", (1.0, 1.0))
        (other.parent / "no run").mkdir()
        assert get(watching(other.parent), "/api/runs")[1] == ["second", "first"]
        assert get(watching(run_at_work.folder), "/api/runs")[1] == ["first", "second"]  # the one asked for comes first

    def test_the_token_and_the_guards_of_steer(self, run_at_work, watching):
        address = watching(run_at_work.folder)
        place = urlsplit(address)
        assert get(f"http://{place.netloc}", "/")[0] == get(f"http://{place.netloc}", "/x/api/runs")[0] == 403
        assert get(address, "/api/runs", Host="evil.example")[0] == 403
        assert get(address, "/api/runs", method="POST")[0] in (403, 411, 415)
        status, text, headers = get(address, "/")
        assert status == 200 and "unsafe" not in headers["content-security-policy"]
        assert "src=" not in text and "access-control-allow-origin" not in headers

    def test_only_pages_of_the_run_are_handed_out_without_an_origin(self, run_at_work, watching):
        address = watching(run_at_work.folder.parent)
        (run_at_work.folder / "report.html").write_text("<p>page</p>")
        (run_at_work.folder.parent / "report.html").write_text("outside")
        status, text, headers = get(address, "/runs/first/report.html")
        assert (status, text, headers["content-security-policy"]) == (200, "<p>page</p>", "sandbox allow-scripts")
        for path in (
            "first/config.yaml",
            "first/explorer.html",
            "../report.html",
            "%2e%2e/report.html",
            "x/report.html",
        ):
            assert get(address, f"/runs/{path}")[0] == 404
        for name in ("..", ".", "none", quote("first/../first", safe="")):
            assert get(address, f"/api/runs/{name}/rollouts")[0] == 404

    def test_rewards_result_and_cost_are_sections(self, run_at_work, watching):
        address = watching(run_at_work.folder)
        assert get(address, "/api/runs/first/rewards")[0] == 400, "no rollout yet"
        for _ in range(6):
            run_at_work.update()
        found = {part: get(address, f"/api/runs/first/{part}") for part in ("rewards", "result", "cost")}
        assert {part: [s["name"] for s in reply[1]] for part, reply in found.items()} == {
            "rewards": ["latent"],
            "result": ["result", "codebook"],
            "cost": ["cost"],
        }
        rewards = found["rewards"][1][0]
        assert {figure["name"] for figure in rewards["figures"]} >= {"distribution", "course-reward"}
        assert any("verifier failed: Timeout" in row[0] for table in rewards["tables"] for row in table["rows"])
        assert get(address, "/api/runs/first/config.yaml")[0] == 400

    def test_a_run_whose_config_is_broken_says_so(self, run_at_work, watching):
        (run_at_work.folder / "config.yaml").write_text("base: [")
        status, reply, _ = get(watching(run_at_work.folder), "/api/runs/first/rollouts")
        assert status == 400 and "config.yaml" in reply["error"]["message"]

    def test_runs_that_nobody_asks_for_are_forgotten(self, run_at_work):
        for number in range(10):
            folder = run_at_work.folder.with_name(f"run{number}")
            folder.mkdir()
            (folder / "config.yaml").write_bytes((run_at_work.folder / "config.yaml").read_bytes())
        runs = FollowedRuns(run_at_work.folder.parent)
        first = runs.run("run0")
        assert runs.run("run0") is first
        for number in range(1, 9):
            runs.run(f"run{number}")
        assert runs.run("run8") is runs.run("run8") and runs.run("run0") is not first


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_while_a_page_listens(run_at_work, number):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "pipeline", "watch", str(run_at_work.folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line.startswith("watch page: http://127.0.0.1:") and "reached from this machine only" in line
        stream = events(line.split()[2].removesuffix("/"))
        next_of(stream, "state")
        began = time.monotonic()
        process.send_signal(number)
        assert process.stdout.read().endswith("stopped\n") and process.stderr.read() == ""
        assert process.wait(20) == 0 and time.monotonic() - began < 20


def test_what_is_no_run_is_refused(tmp_path):
    for target, said in ((tmp_path / "none", "none"), (tmp_path, "neither a run folder nor a folder of runs")):
        result = CliRunner().invoke(app, ["watch", str(target)])
        assert result.exit_code == 2 and said in result.output
