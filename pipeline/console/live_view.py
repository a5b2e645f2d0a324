"""The live view of a run on a terminal: a few lines, rendered for the terminal's current width and height."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from rich.text import Text

from pipeline.console.progress import UNITS, RunProgress, StageProgress, clock, key_metrics, number, sparkline

LABEL = 10
"""Columns of the labels on the left."""
_WHOSE = {"rollouts": "in the rollouts", "inverse_dynamics": "of the inverse dynamics model"}
_OWN_LINE = {
    *("reward", "success", "loss", "staleness_mean", "staleness_max"),
    *(f"{whose}_{name}" for whose in _WHOSE for name in ("alive_codes", "alive_share", "code_perplexity")),
    *("tokens", "rollouts", "seconds_update_total", "idle_learner", "idle_workers", "learning_rate", "gradient_norm"),
    *("failures", "updates_skipped", "tokens_per_rollout"),
}
"""Metrics that have a separate line, or are of little use."""


@dataclass(frozen=True)
class Marks:
    """The characters of the view."""

    done: str = "✔"
    current: str = "▶"
    ahead: str = "·"
    full: str = "━"
    rest: str = "─"
    warning: str = "⚠"
    ascii_only: bool = False


PLAIN_MARKS = Marks(done="+", current=">", ahead=".", full="=", rest="-", warning="!", ascii_only=True)
"""For terminals that can only show ASCII."""


def view(run: RunProgress, *, width: int, height: int, marks: Marks = Marks()) -> list[Text]:
    """The lines to show, none wider than ``width``; at most ``height`` of them, the least important ones left out
    first."""
    stages = [_stage_line(stage, run, width, marks) for stage in run.stages.values()]
    current, footer = run.current, _footer(run)
    details = [] if current is None else list(_details(current, run, width, marks))
    troubles = [_labelled("", Text(f"{marks.warning} {_when(when)} {what}", "yellow")) for when, what in run.troubles]
    if current is not None:
        troubles += [_labelled("", Text(f"{marks.warning} {caution}", "yellow")) for caution in current.cautions]
    room = max(0, height - len(stages) - 1)
    shown = details[: max(1, room - len(troubles))] if room else []
    lines = [*stages, *shown, *troubles[: max(0, room - len(shown))], footer]
    for line in lines:
        line.truncate(width, overflow="ellipsis" if not marks.ascii_only else "crop")
    return lines[-height:] if height > 0 else lines


def _stage_line(stage: StageProgress, run: RunProgress, width: int, marks: Marks) -> Text:
    names = max(map(len, run.stages))
    digits = max(len(str(s.total)) for s in run.stages.values())
    count = f"{stage.step:>{digits}}/{stage.total:<{digits}}" if stage.total else " " * (2 * digits + 1)
    if stage.state == "current":
        return _current(stage, Text.assemble((f"{marks.current} {stage.name:<{names}}  {count}", "bold")), width, marks)
    if stage.state == "done":
        metrics = [f"{name} {number(value)}" for name, value in key_metrics(stage.metrics, 3)]
        took = "before" if stage.took is None else clock(stage.took)
        line = Text.assemble((marks.done, "green"), f" {stage.name:<{names}}  {count}  {took:>6}")
        return _fill(line, metrics, width, "dim")
    if run.current is None and stage is next((s for s in run.stages.values() if s.state == "ahead"), None):
        return Text.assemble((f"{marks.current} {stage.name:<{names}}  starting", "bold"))
    expected = run.ahead.seconds.get(stage.name)
    count = f"{stage.total} {UNITS.get(stage.name, 'updates')}" if stage.total else ""
    about = f"about {clock(expected)}" if expected is not None else ""
    return Text(f"{marks.ahead} {stage.name:<{names}}  " + ", ".join(part for part in (count, about) if part), "dim")


def _current(stage: StageProgress, line: Text, width: int, marks: Marks) -> Text:
    """The line of the current stage, with a bar that fills the width."""
    share = stage.step / stage.total if stage.total else 0.0
    tail = f" {share:4.0%}" if stage.total else ""
    tail += f"  ETA {clock(stage.left)}" if stage.seconds and stage.step < stage.total else f"  {clock(stage.elapsed)}"
    room = min(60, width - line.cell_len - len(tail) - 2)
    line.append("  ")
    if room >= 5 and stage.total:
        full = round(share * room)
        line.append(marks.full * full, "green").append(marks.rest * (room - full), "dim")
    return line.append(tail)


def _details(stage: StageProgress, run: RunProgress, width: int, marks: Marks) -> Iterator[Text]:
    """The metrics of the current stage, a line for each topic."""
    metrics = stage.metrics
    name = "reward" if "reward" in metrics else "loss"
    if stage.curve:
        value = f"{number(stage.curve[-1]):<7}"
        more = f"  success {number(metrics['success'])}" if "success" in metrics else ""
        room = max(0, min(60, width - LABEL - len(value) - len(more) - 3))
        curve = sparkline(stage.curve, room, ascii_only=marks.ascii_only) if len(stage.curve) > 1 and room else ""
        yield _labelled(name, Text.assemble((value, "bold"), (curve, "green"), more))
    speed = [] if stage.tokens_per_second is None else [f"{stage.tokens_per_second:,.0f} tokens/s"]
    if stage.seconds:
        speed.append(f"{stage.seconds:.2f} s/update" if stage.seconds >= 0.1 else f"{1 / stage.seconds:.0f} updates/s")
    if speed:
        yield _labelled("speed", Text(", ".join(speed)))
    if "idle_learner" in metrics and "idle_workers" in metrics:
        yield _labelled("idle", Text(f"learner {metrics['idle_learner']:.0%}, workers {metrics['idle_workers']:.0%}"))
    if "staleness_mean" in metrics:
        bound = "" if run.ahead.max_staleness is None else f", bound {run.ahead.max_staleness}"
        most = f", at most {number(metrics['staleness_max'])}" if "staleness_max" in metrics else ""
        yield _labelled("staleness", Text(f"{number(metrics['staleness_mean'])} updates{most}{bound}"))
    if run.codes is not None:
        whose, active, perplexity = run.codes
        of = f" of {run.ahead.num_actions}" if run.ahead.num_actions else ""
        yield _labelled("codes", Text(f"{number(active)}{of} active, perplexity {perplexity:.1f}, {_WHOSE[whose]}"))
    others = [
        f"{name} {number(value)}" for name, value in key_metrics(metrics, 99) if name not in _OWN_LINE and _short(name)
    ]
    if others:
        yield _fill(_labelled("more", Text()), others[:6], width, "")


def _short(name: str) -> bool:
    return not name.startswith(
        ("seconds_", "staleness_", "gradients_", "parameters_", "worker_", "driver_", "rollout_")
    )


def _footer(run: RunProgress) -> Text:
    seconds, unknown = run.left()
    line = Text(f"  {clock(run.elapsed)} so far", "dim")
    if run.current is None and not unknown and all(stage.state == "done" for stage in run.stages.values()):
        return line
    left = f"run ETA {clock(seconds)}" if seconds else "to come:"
    rest = f"{' +' if seconds else ''} {', '.join(unknown)}" if unknown else ""
    return line.append(f", {left}{rest}")


def _labelled(label: str, value: Text) -> Text:
    return Text.assemble("  ", (f"{label:<{LABEL}}", "dim"), value)


def _fill(line: Text, parts: list[str], width: int, style: str) -> Text:
    """Appends as many whole parts as fit, two columns apart."""
    for part in parts:
        gap = "" if line.plain.endswith("  ") else "  "
        if line.cell_len + len(gap) + len(part) > width:
            break
        line.append(f"{gap}{part}", style)
    return line


def _when(seconds: float) -> str:
    return time.strftime("%H:%M", time.localtime(seconds))
