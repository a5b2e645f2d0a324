"""Reads ``summary.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.runs.layout import SUMMARY


def read_summary(run_dir: Path) -> dict[str, Any]:
    """What ``summary.json`` holds; empty where a run has none yet, or none that can be read."""
    try:
        found = json.loads((run_dir / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def collapse_words(summary: Mapping[str, Any]) -> list[str]:
    """The explorer's verdict on the codebook after reinforcement learning in a sentence; none where there is none."""
    found = summary.get("collapse")
    if not isinstance(found, Mapping):
        return []
    before, after = found["marginal"]
    why = "; ".join(found["reasons"]) or f"{found['acting']} of {found['probed']} probed codes change a top token"
    return [f"codebook after RL: {found['verdict']} ({after:.1f} effective codes, {before:.1f} before; {why})"]
