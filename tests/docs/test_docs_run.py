"""Every ``latent-control`` line of README and docs is run, with the stand-ins of ``doc_commands.py``: what trains takes
a few steps.

Quick ones share a folder and this process. Slow ones have a folder each; ``serve`` and ``ui`` are started, asked and
stopped, ``submit`` and ``job`` go to a cluster of three Ray nodes on this machine.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from cluster_fixtures import LocalCluster, free_port
from doc_commands import GROUPS, NOT_HERE, ROOT, smaller, typed, written
from typer.testing import CliRunner

from latent_control import LatentActionLM
from latent_control.policies.latent import latent_policy
from pipeline.cli.main import app
from pipeline.cli.options import INTERRUPTED
from pipeline.experiments import pilot
from pipeline.storage import checkpoints

pytest_plugins = ("rl_fixtures", "run_fixtures", "cluster_fixtures")
QUICK = {
    "config check",
    "config show",
    "config schema",
    "config reference",
    "task check",
    "reward report",
    "doctor",
    "runs",
    "show",
}
QUICK |= {"init", "audit", "diagnose", "compare", "export", "scale", "off-policy", "cluster-files"}
SERVERS, JOBS = {"serve": "/v1/models", "ui": "/health", "steer": None, "watch": None}, {"submit", "job"}
NO_SERVER = {"--prompt", "--terminal"}
OUTPUTS = ("-o", "--out", "--run-dir")
# Exit codes other than 0 that are an answer.
ANSWERS = {"doctor": {0, 1}}
Words = tuple[str, ...]


def name_of(words: Words) -> str:
    return " ".join(words[: 2 if words[0] in GROUPS else 1])


def runnable() -> dict[Words, str]:
    """Words -> the page that has them first."""
    found: dict[Words, str] = {}
    for line in written():
        if (line.page, line.text) not in NOT_HERE:
            for words in typed(line):
                found.setdefault(words, line.page)
    return found


def is_name(words: Words) -> bool:
    """A bare name that needs more: prose about the command, whose help is asked for."""
    return words == tuple(name_of(words).split()) and name_of(words) not in (
        "doctor",
        "runs",
        "config reference",
        "config schema",
    )


def is_quick(words: Words) -> bool:
    return is_name(words) or (
        name_of(words) in QUICK and not {"--register", "runs/offline", "token_level"} & set(words)
    )


def is_server(words: Words) -> bool:
    return words[0] in SERVERS and not NO_SERVER & set(words)


def is_ours(words: Words) -> bool:
    """Ends by itself, in this process."""
    return not is_server(words) and words[0] not in JOBS


def cases(wanted: bool) -> list[object]:
    return [
        pytest.param(page, words, id=f"{page}: {' '.join(words)[:80]}")
        for words, page in runnable().items()
        if is_quick(words) is wanted
    ]


# -- the folder a reader would be in -----------------------------------------------------------------------------------


def furnish(folder: Path, small_run: Path) -> Path:
    """Rows, pairs, configs, finished runs under the names that the docs use, one that is going, one that was
    stopped."""
    rows = [json.loads(line) for line in (ROOT / "docs/examples/rows.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({"prompt": row["problem"]} | row) + "\n" for row in rows)
    for name in ("rows.jsonl", "data.jsonl"):
        (folder / name).write_text(text)
    pair = '{{"prompt": "{0} 2 -> 2 :", "chosen": "{0} * 2", "rejected": "{0}"}}\n'
    (folder / "pairs.jsonl").write_text("".join(pair.format(i) for i in range(1, 9)))
    configs = folder / "configs"
    configs.mkdir()
    for config in (ROOT / "configs").glob("*.yaml"):
        shutil.copy(config, configs)
    shutil.copy(configs / "quickstart.yaml", configs / "mine.yaml")
    for name in ("models", "bank"):
        (configs / name).symlink_to(ROOT / "configs" / name)
    for name in ("mine", "config", "my-config"):
        invoke(folder, "init", "rows.jsonl", "--base", "configs/models/countdown-1m", "-o", f"{name}.yaml")
        (folder / f"{name}-samples.jsonl").write_text(text)
    runs = folder / "runs"
    for name in ("first", "going", "stopped"):
        shutil.copytree(small_run, runs / name)
    for name in ("going", "stopped"):
        (runs / name / "stages" / "improve.json").unlink()
    shutil.copy(small_run.parent / "mlflow.db", runs)
    for name in ("A", "B", "NAME", "mine"):
        (runs / name).symlink_to("first")
    invoke(folder, "export", "runs/first", "-o", "exported")
    in_tasks = folder / "tasks.md"  # that page brings its own rows
    in_tasks.mkdir()
    page = (ROOT / "docs/tasks.md").read_text()
    for name, content in re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE):
        (in_tasks / name).write_text(content)
    shutil.copy(in_tasks / "rows.yaml", in_tasks / "my-config.yaml")
    for name in ("configs", "pairs.jsonl", "runs"):
        (in_tasks / name).symlink_to(Path("..") / name)
    return folder


@pytest.fixture(scope="module")
def shared(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnish(tmp_path_factory.mktemp("reader"), small_run)


@pytest.fixture
def own(shared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared, tmp_path / "reader", symlinks=True))


def invoke(folder: Path, *words: str, codes: frozenset[int] | set[int] = frozenset({0})) -> str:
    """The command's output, run in ``folder`` in this process; what it is to write is not there before and is there
    after."""
    outputs = outputs_of(folder, words)
    before = Path.cwd()
    os.chdir(folder)
    try:
        done = CliRunner().invoke(app, words)
    finally:
        os.chdir(before)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code in codes, f"latent-control {' '.join(words)} -> {done.exit_code}\n{done.output[-3000:]}"
    assert [path for path in outputs if not path.exists()] == [], done.output[-3000:]
    return done.output


def outputs_of(folder: Path, words: Sequence[str]) -> list[Path]:
    """What the command will write, cleared away."""
    if "--help" in words or words[0] == "cluster-files":  # it prints; the run folder is the cluster's
        return []
    outputs = [folder / words[i + 1] for i, word in enumerate(words) if word in OUTPUTS]
    outputs += [folder / f"{Path(words[1]).stem}-samples.jsonl"] if words[0] == "sample" else []
    outputs += [folder / "config.yaml"] if words[0] == "init" and "-o" not in words else []
    for path in outputs:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    return outputs


def folder_of(page: str, reader: Path) -> Path:
    return reader / page if (reader / page).is_dir() else reader


# -- tests -------------------------------------------------------------------------------------------------------------


def test_what_is_not_run_is_what_the_list_says() -> None:
    lines = {(line.page, line.text) for line in written()}
    assert set(NOT_HERE) <= lines, "a line of the list has gone from its page"
    left = lines - {(line.page, line.text) for line in written() if any(words in runnable() for words in typed(line))}
    assert left == set(NOT_HERE)


@pytest.mark.parametrize(("page", "words"), cases(True))
def test_a_quick_command(page: str, words: Words, shared: Path) -> None:
    if is_name(words):
        assert "Usage" in invoke(shared, *words, "--help")
    else:
        invoke(folder_of(page, shared), *smaller(words), codes=ANSWERS.get(name_of(words), {0}))


def prepare(page: str, words: Words, folder: Path) -> None:
    """What other lines of the same page make before this one."""
    if "runs/offline" in words and words[0] != "run":
        invoke(folder, *smaller(("run", "configs/improve_offline.yaml", "--run-dir", "runs/offline")))
    if "--q" in words:
        invoke(folder, *smaller(("train-q", "runs/first")))
    if page == "bank.md":
        with_bank(folder, full=words[:2] != ("bank", "create"))
    if "token_level" in words:
        with_baseline = ("run", "configs/quickstart.yaml", "improve.token_baseline=true", "--run-dir", "runs/first")
        invoke(folder, *smaller(with_baseline))
    if words[:2] == ("run", "pilot.yaml"):
        rows = pilot.PilotData(path=folder / "data.jsonl", prompt="prompt", answer="answer", verifier="exact")
        base = str(ROOT / "configs/models/countdown-1m")
        pilot.written(folder / "pilot.yaml", pilot.template(rows, base, chat=False, max_new_tokens=17, heldout=8))


def with_bank(folder: Path, *, full: bool) -> None:
    """Runs with ``mlp`` policies on the codebook of ``runs/first``, and a bank of them unless that is to be made."""
    model = LatentActionLM.from_pretrained(folder / "runs/first/checkpoints/actions")
    model.config = dataclasses.replace(model.config, policy_kind="mlp", policy_reads=None)
    for name in ("concise", "formal") if full else ("concise", "formal", "world"):
        shutil.copytree(folder / "runs/first", folder / "runs" / name, ignore=lambda *_: {"checkpoints"})
        model.policy = latent_policy(model.base.decoder, model.config)
        checkpoint = folder / "runs" / name / "checkpoints/improve"
        checkpoints.write(checkpoint, files=lambda staging: model.save_pretrained(staging) and None, info={})
    if full:
        invoke(folder, "bank", "create", "bank", "--from", "runs/concise")
        for name in ("concise", "formal"):
            invoke(folder, "bank", "add", "bank", name, f"runs/{name}")


def has_what_it_needs(words: Words) -> bool:
    return "configs/agents_textworld.yaml" not in words or (
        find_spec("textworld_express") is not None and shutil.which("java") is not None
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("page", "words"),
    [case for case in cases(False) if not is_server(case.values[1]) and case.values[1][0] not in JOBS],
)
def test_a_slow_command(page: str, words: Words, own: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for sizes in ("FULL", "FEWEST", "PROBED"):  # of a pilot, whose only other dial is time
        monkeypatch.setattr(pilot, sizes, dict.fromkeys(pilot.FULL, 3))
    monkeypatch.setattr(pilot, "RESPONSES", 320)
    if not has_what_it_needs(words):
        pytest.skip("needs Java and the extra 'agents'")
    prepare(page, words, own)
    invoke(folder_of(page, own), *smaller(words))


@contextmanager
def started(folder: Path, words: Sequence[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """The program as a process of its own, which is stopped by Ctrl-C if it has not ended."""
    log = (folder / "log").open("w")
    command = [sys.executable, "-m", "pipeline", *words]
    process = subprocess.Popen(
        command, cwd=folder, env=environment | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log, text=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(120)


def address(command: str, port: int, log: Path) -> str:
    """Where a server answers; of those whose link holds a token, what it printed."""
    if (path := SERVERS[command]) is not None:
        return f"http://127.0.0.1:{port}{path}"
    found = re.search(rf"http://127\.0\.0\.1:{port}/\S+", log.read_text())
    if found is None:
        raise ConnectionError("it has not printed its link yet")
    return found[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("page", "words"), [case for case in cases(False) if is_server(case.values[1])])
def test_a_server_starts_answers_and_stops(page: str, words: Words, own: Path) -> None:
    prepare(page, words, own)
    port = free_port()
    with started(own, [*words, "--port", str(port)], dict(os.environ)) as process:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (own / "log").read_text()[-3000:]
            try:
                with urllib.request.urlopen(address(words[0], port, own / "log"), timeout=10) as reply:
                    assert reply.status == 200
                    break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) in (0, INTERRUPTED)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("page", "words"), [case for case in cases(False) if case.values[1][0] in JOBS])
def test_a_job_runs_on_three_nodes(page: str, words: Words, own: Path, cluster: LocalCluster) -> None:
    run_dir = own / words[words.index("--run-dir") + 1]
    given = [
        cluster.address if word == "URL" else str(own / word) if word.startswith("runs/") else word
        for word in smaller(words)
    ]
    environment = cluster.environment | ({} if words[0] == "submit" else {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}"})
    with started(own, given, environment) as process:
        assert process.wait(500) == 0, (own / "log").read_text()[-3000:]
    assert json.loads((run_dir / "summary.json").read_text())["stages"].keys() == {"actions", "clone", "improve"}
