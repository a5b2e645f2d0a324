"""Notes of codes and rollouts, kept in the run folder."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, StrictStr

from pipeline.runs.layout import NOTES
from pipeline.storage.atomic import write_atomic
from rollout_workers.openai_api.errors import RefusedRequest

MOST_NOTES = 1000


class Note(BaseModel):
    """``Note(about="code 7", text="writes the target")``; an empty text takes a note away."""

    model_config = ConfigDict(extra="forbid")
    about: StrictStr = Field(min_length=1, max_length=200)
    text: StrictStr = Field(max_length=2000)


def read_notes(run_dir: Path) -> dict[str, str]:
    """Texts by what they are about; ``RefusedRequest`` where the file is damaged."""
    path = run_dir / NOTES
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise RefusedRequest(f"{path} is damaged: mend it, or move it away", 409)
    return found


def keep_note(run_dir: Path, note: Note) -> dict[str, str]:
    """All notes, with this one."""
    notes = read_notes(run_dir) | {note.about: note.text.strip()}
    notes = {about: text for about, text in notes.items() if text}
    if len(notes) > MOST_NOTES:
        raise RefusedRequest(f"{run_dir.name} has {MOST_NOTES} notes, the most there can be: empty one first")
    write_atomic(run_dir / NOTES, json.dumps(notes, indent=1).encode())
    return notes
