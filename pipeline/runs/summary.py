"""Reads ``summary.json``."""

from __future__ import annotations

import json
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
