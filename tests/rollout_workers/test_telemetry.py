"""Metrics for Prometheus: dashboard and alerts name those that there are, and a run and a service export them."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import ray
import yaml
from cluster_fixtures import free_port
from run_fixtures import command

from pipeline.runs.events import Events, read_events
from pipeline.runs.metrics_log import RunLog, records
from rollout_workers import telemetry

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "pipeline" / "tracking" / "grafana.json").read_text())
OURS = re.compile(r"\bray_latent_control_(\w+)")


def metrics_in(*expressions: str) -> set[str]:
    """Names of the table, for a histogram without what Prometheus puts behind it."""
    found = {name for text in expressions for name in OURS.findall(text)}
    return {name.removesuffix("_bucket") for name in found}


def shown() -> set[str]:
    return metrics_in(*(target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]))


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    assert shown() == telemetry.METRICS.keys()
    assert metrics_in(DASHBOARD["templating"]["list"][1]["query"]) == {"update"}


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) and DASHBOARD["schemaVersion"] >= 36
    for panel in panels:
        assert {"type", "title", "gridPos", "datasource", "targets"} <= panel.keys()
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)
    for panel in panels:  # a histogram is asked for by its buckets, a counter by its rate or its sum
        for target in panel["targets"]:
            for name in metrics_in(target["expr"]):
                assert ("_bucket" in target["expr"]) == (telemetry.METRICS[name].kind == "Histogram")


def test_labels_are_those_of_the_metric() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            (name, *_) = metrics_in(target["expr"])
            named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert named <= {*telemetry.METRICS[name].tags, "le"}, target


def test_alerts_name_metrics_that_there_are() -> None:
    text = (ROOT / "docs" / "observe.md").read_text()
    rules = yaml.safe_load(re.search(r"<!-- alerts -->\n```yaml\n(.*?)```", text, re.DOTALL)[1])["groups"][0]["rules"]
    named = metrics_in(*(rule["expr"] for rule in rules))
    assert named <= telemetry.METRICS.keys()
    wanted = {"staleness_max", "idle_learner", "idle_workers", "tied_groups", "logp_gap", "tracking_waiting"}
    assert wanted <= named and all(rule["annotations"]["do"] for rule in rules)


def test_names_are_prometheus_names() -> None:
    for name, (kind, text, tags) in telemetry.METRICS.items():
        assert re.fullmatch(r"[a-z_]+", name) and text and kind in ("Counter", "Gauge", "Histogram")
        assert name.endswith("_total") == (kind == "Counter") or name == "seconds_update_total"
        assert not {"le", "job", "instance"} & set(tags)


def test_counting_starts_no_ray() -> None:
    before = ray.is_initialized()
    telemetry.count("events_total", 0, run="a", kind="b")
    telemetry.count("events_total", run="a", kind="b")
    telemetry.seconds("worker_request_seconds", 0.0, worker="1")
    telemetry.step("a", "improve", 3, {"reward": math.nan, "not_exported": 1.0})
    assert ray.is_initialized() == before


def test_events_say_run_stage_and_update(tmp_path: Path) -> None:
    events = Events(tmp_path / "first")
    log = RunLog(tmp_path / "first", quiet=True, events=events)
    log.message("before", "early")
    log.begin("improve", 5)
    log.log("improve", 3, {"reward": 0.5})
    log.message("worker 2 died", "worker_lost", worker=2)
    log.message("another stage's", "damaged", stage="clone")
    events.note("tracking_away", "the store is away")
    log.close()
    early, lost, other, away = read_events(tmp_path / "first")
    assert early["run"] == "first" and "stage" not in early
    assert {"run": "first", "stage": "improve", "update": 3, "worker": 2}.items() <= lost.items()
    assert other["stage"] == "clone"
    assert (away["stage"], away["update"]) == ("improve", 3)


@contextmanager
def scraped(port: int) -> Iterator[dict[str, set[str]]]:
    """Names of the table that a port exports, and their label sets, looked at twice a second."""
    found: dict[str, set[str]] = {}
    done = threading.Event()

    def scrape() -> None:
        while not done.wait(0.5):
            with suppress(OSError):
                page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
                for name, labels in re.findall(r"^ray_latent_control_(\w+){(.*)} ", page, re.MULTILINE):
                    found.setdefault(name.removesuffix("_bucket"), set()).add(labels)

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_and_a_service_export_every_metric_of_the_dashboard(tmp_path: Path) -> None:
    tiny = ["actions.updates=3", "clone.updates=2", "improve.updates=3", "evaluation.prompts=8", "explorer.seconds=0"]
    tiny += ["actions.min_alive_share=0.0", "rollout.num_workers=1"]
    port, serving, http = free_port(), free_port(), free_port()
    environment = os.environ | {"RAY_metrics_report_interval_ms": "1000", "PYTHONPATH": str(ROOT)}
    words = command("run", "quickstart", *tiny, f"cluster.metrics_port={port}", "--run-dir", str(tmp_path / "first"))
    with scraped(port) as found:
        done = subprocess.run(
            [*words, "--json"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert telemetry.METRICS.keys() - found.keys() == {name for name in telemetry.METRICS if name.startswith("server_")}
    assert any('stage="improve"' in labels and 'run="first"' in labels for labels in found["reward"])
    logged = [r for r in records(tmp_path / "first" / "metrics.jsonl") if r["stage"] == "improve"]
    assert len(logged) == 3
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(line["run"] == "first" for line in lines) and lines[-1]["event"] == "end"

    service = subprocess.Popen(
        command("serve", str(tmp_path / "first"), "--port", str(http), "--metrics-port", str(serving)),
        cwd=tmp_path,
        env=environment,
    )
    try:
        with scraped(serving) as found:
            ask = urllib.request.Request(f"http://127.0.0.1:{http}/v1/completions", b'{"prompt": "3 5 7"}')
            deadline = time.monotonic() + 300
            wanted = {name for name in telemetry.METRICS if name.startswith("server_")}
            while not wanted <= found.keys() and time.monotonic() < deadline:
                with suppress(OSError):
                    urllib.request.urlopen(ask, timeout=30).read()
                time.sleep(1.0)
        assert wanted <= found.keys()
        assert any('status="200"' in labels and 'model="first"' in labels for labels in found["server_requests_total"])
    finally:
        service.terminate()
        service.wait(60)
