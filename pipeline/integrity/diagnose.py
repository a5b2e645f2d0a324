"""``latent-control diagnose RUN``: what ended a run or holds it up, the evidence, and the next command."""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from pipeline.console.progress import clock
from pipeline.runs.events import read_events
from pipeline.runs.layout import METRICS, STALL
from pipeline.runs.metrics_log import records
from pipeline.runs.process import read_process
from pipeline.runs.status import overview

_ENDS = ("finished", "failed", "stopped")
_TROUBLES = (
    *("worker_lost", "worker_let_go", "worker_recycled", "learner_silent", "rebuilt"),
    *("update_skipped", "verifier_failed", "tracking_away"),
)
_SLOW = 10
"""A running run is silent when its last line is as many times older than its updates take."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """One cause. ``Diagnosis(state="failed", cause="the disk is full", evidence=("OSError: ...",), next="df -h
    runs/a")``."""

    state: str
    """finished, running, stopped, failed or killed."""
    cause: str
    evidence: tuple[str, ...]
    next: str
    """The command to give now."""


@dataclass(frozen=True, kw_only=True)
class _Traces:
    """What a run left behind."""

    run_dir: Path
    start: Sequence[Mapping[str, Any]]
    """Events of the last start, oldest first."""
    status: str
    metrics: Sequence[Mapping[str, Any]]

    @property
    def end(self) -> Mapping[str, Any]:
        """The event that the last start ended with; empty when it came to none."""
        return next((event for event in reversed(self.start) if event["kind"] in _ENDS), {})

    def texts(self, *kinds: str) -> list[str]:
        """Of the last start's events of these kinds."""
        return [f"{_when(event)} {event['text']}" for event in self.start if event["kind"] in kinds]


def diagnose(run_dir: Path) -> Diagnosis:
    """The cause that explains most of what is found in ``run_dir``.

    Raises:
        ValueError: nothing was ever started there.
    """
    events = read_events(run_dir)
    starts = [number for number, event in enumerate(events) if event["kind"] == "started"]
    if not starts:
        raise ValueError(
            f"{run_dir} has no events: nothing was started there, or by a version that kept none; see "
            "latent-control show"
        )
    traces = _Traces(
        run_dir=run_dir,
        start=events[starts[-1] :],
        status=overview(run_dir).status,
        metrics=records(run_dir / METRICS),
    )
    return next(filter(None, (rule(traces) for rule in _RULES)))


def _finished(t: _Traces) -> Diagnosis | None:
    if t.end.get("kind") != "finished":
        return None
    counts = Counter(event["kind"] for event in t.start if event["kind"] not in ("started", "finished"))
    incidents = ", ".join(f"{n} x {kind.replace('_', ' ')}" for kind, n in counts.items())
    cause = f"it finished, in spite of {incidents}" if counts else "it finished, and nothing went wrong"
    lacking = counts["tracking_lost"] or counts["tracking_away"] > counts["tracking_back"]
    behind = lacking and not counts["tracking_synced"]
    evidence = [text for event in t.start[1:-1] for text in [f"{_when(event)} {event['text']}"]][-5:]
    return Diagnosis(
        state="finished",
        cause=cause,
        evidence=tuple(evidence),
        next=f"latent-control {'sync' if behind else 'audit'} {t.run_dir}",
    )


def _running(t: _Traces) -> Diagnosis | None:
    if t.status != "running":
        return None
    troubles = t.texts(*_TROUBLES)
    times = [float(r["time"]) for r in t.metrics if "time" in r][-20:]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    silence = time.time() - times[-1] if times else 0.0
    if gaps and silence > max(60.0, _SLOW * statistics.median(gaps)):
        cause = (
            f"it has logged nothing for {clock(silence)}, where an update takes {clock(statistics.median(gaps))}: "
            "something hangs"
        )
        return Diagnosis(
            state="running",
            cause=cause,
            evidence=tuple(troubles[-5:]) or ("no trouble was noted before",),
            next=f"kill {_pid(t)}  # SIGTERM: saves and leaves",
        )
    cause = (
        f"it is at work; {len(troubles)} troubles so far"
        if troubles
        else "it is at work, and nothing went wrong so far"
    )
    return Diagnosis(
        state="running", cause=cause, evidence=tuple(troubles[-5:]), next=f"latent-control show {t.run_dir}"
    )


def _stopped(t: _Traces) -> Diagnosis | None:
    if t.end.get("kind") != "stopped":
        return None
    return Diagnosis(
        state="stopped",
        cause=f"somebody or the cluster asked it to end: {t.end['text']}",
        evidence=_last_words(t),
        next=_resume(t),
    )


_CAUSES: Sequence[tuple[Callable[[str, str], bool], str, tuple[str, ...], str]] = (
    (
        lambda error, text: "is full" in text and "make room" in text,
        "the disk is full",
        (),
        "df -h {run}  # make room, then: latent-control resume {run}",
    ),
    (
        lambda error, text: error == "FloatingPointError",
        "updates broke: numbers that are not finite, or log-probabilities on which worker and learner disagree",
        ("update_skipped",),
        "latent-control audit {run}  # look into quarantine/, then lower improve.learning_rate in a new run",
    ),
    (
        lambda error, text: "verifiers could not judge" in text,
        "the reward function or its data fails",
        ("verifier_failed",),
        "latent-control task check NAME  # repair it, then: latent-control resume {run}",
    ),
    (
        lambda error, text: (
            "rollout workers died" in text or "rollout workers are left" in text or "was lost with its worker" in text
        ),
        "rollout workers die again and again",
        ("worker_lost", "worker_let_go"),
        "latent-control doctor  # memory and drivers of the nodes, then: latent-control resume {run}",
    ),
    (
        lambda error, text: error == "TimeoutError",
        "rollout workers fell silent",
        ("worker_lost",),
        "latent-control resume {run}  # or raise cluster.worker_timeout_seconds",
    ),
    (
        lambda error, text: "lost a part of itself" in text,
        "parts of the cluster were lost more often than cluster.max_rebuilds allows",
        ("learner_silent", "rebuilt"),
        "latent-control resume {run}",
    ),
)


def _failed(t: _Traces) -> Diagnosis | None:
    if t.end.get("kind") != "failed":
        return None
    error, text = str(t.end.get("error")), str(t.end["text"])
    evidence = [f"{error}: {text}", *map(str, t.end.get("where", ())[-2:])]
    for applies, cause, kinds, command in _CAUSES:
        if applies(error, text):
            return Diagnosis(
                state="failed",
                cause=cause,
                evidence=(*evidence, *t.texts(*kinds)[-4:]),
                next=command.format(run=t.run_dir),
            )
    return Diagnosis(
        state="failed", cause=f"{error}: {text}", evidence=(*evidence[1:], *_last_words(t)), next=_resume(t)
    )


def _stalled(t: _Traces) -> Diagnosis | None:
    path = t.run_dir / STALL
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    if not lines:
        return None
    newest = lines[
        max((n for n, line in enumerate(lines) if line.startswith(("Thread", "Current thread"))), default=0) :
    ]
    evidence = (f"stacks of all threads: {path}", *(line.strip() for line in newest[1:4]))
    cause = "no update was finished within cluster.stall_seconds; the watchdog ended it"
    return Diagnosis(state="killed", cause=cause, evidence=evidence, next=_resume(t))


def _killed(t: _Traces) -> Diagnosis:
    last = t.metrics[-1] if t.metrics else {}
    gib = float(last.get("driver_gib") or 0) + float(last.get("worker_gib") or 0) * float(
        last.get("rollout_workers") or 0
    )
    total = psutil.virtual_memory().total / 2**30
    free = shutil.disk_usage(t.run_dir).free / 2**30
    evidence = [*_last_words(t)]
    cause = "its process was killed without a word: kill -9, a lost machine, or the system's memory guard"
    if gib > 0.85 * total:
        cause = "its process was killed without a word, most likely for memory"
        evidence.insert(
            0, f"driver and workers held {gib:.1f} of this machine's {total:.1f} GiB; set cluster.worker_memory_gib"
        )
    if free < 0.5:
        evidence.insert(0, f"the disk has {free:.2f} GiB left")
    return Diagnosis(state="killed", cause=cause, evidence=tuple(evidence), next=_resume(t))


_RULES: Sequence[Callable[[_Traces], Diagnosis | None]] = (_running, _finished, _stopped, _failed, _stalled, _killed)


def _last_words(t: _Traces) -> tuple[str, ...]:
    last = t.metrics[-1] if t.metrics else None
    logged = (
        (f"the last line of {METRICS}: {last['stage']} {last['step']}",)
        if last
        else (f"nothing was logged in {METRICS}",)
    )
    return (*logged, *[f"{_when(event)} {event['text']}" for event in t.start if event["kind"] not in _ENDS][-3:])


def _resume(t: _Traces) -> str:
    return f"latent-control resume {t.run_dir}"


def _pid(t: _Traces) -> str:
    return str(read_process(t.run_dir)["pid"])


def _when(event: Mapping[str, Any]) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(event["time"])))


def as_json(found: Diagnosis) -> str:
    """For programs."""
    return json.dumps(asdict(found), indent=2)
