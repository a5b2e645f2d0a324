"""The order of the commands in ``latent-control --help``, grouped by purpose."""

from __future__ import annotations

import typer

FIRST = "First steps"
PANELS: dict[str, tuple[str, ...]] = {
    FIRST: ("doctor", "init", "run", "watch", "resume", "show", "explain", "steer", "compare", "export"),
    "Train": ("sample", "config", "task", "reward"),
    "Look": ("runs", "ui", "report", "evaluate", "audit", "diagnose"),
    "Compare and choose": ("pilot", "off-policy", "tune-codes", "sweep", "search", "train-q"),
    "Use": ("serve", "gateway", "bank"),
    "On a cluster, and repair": ("submit", "job", "cluster-files", "scale", "sync", "reproduce"),
}
"""The ten commands that a newcomer needs, in the order of need; then the others by purpose."""
MORE = "More"


def arrange(app: typer.Typer) -> None:
    """Sort the commands and groups of ``app`` into panels; one that no panel names comes last."""
    places = {
        name: (at, panel) for at, (panel, name) in enumerate((p, n) for p, names in PANELS.items() for n in names)
    }
    for found in (app.registered_commands, app.registered_groups):
        for info in found:
            info.rich_help_panel = places.get(name_of(info), (0, MORE))[1]
        found.sort(key=lambda info: places.get(name_of(info), (len(places), MORE))[0])


def name_of(info: typer.models.CommandInfo | typer.models.TyperInfo) -> str:
    """The word a user types."""
    callback = (
        info.callback.__name__
        if info.callback and not isinstance(info.callback, typer.models.DefaultPlaceholder)
        else ""
    )
    return info.name if isinstance(info.name, str) else callback.replace("_", "-")
