"""What judges have said, by the hash of what they were asked, and how many requests they may still be sent."""

from __future__ import annotations

import sqlite3
import threading

_TABLES = """
CREATE TABLE IF NOT EXISTS answers (asked TEXT PRIMARY KEY, said TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sent (requests INTEGER NOT NULL);
INSERT INTO sent SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM sent);
"""


class JudgeAnswers:
    """A SQLite file that the workers of a machine share, and a run that is resumed goes on with; ``None``: this
    process's memory.

    ``answers = JudgeAnswers("judge.sqlite"); answers.get(hash); answers.spend(1000); answers.put(hash, said)``
    """

    def __init__(self, path: str | None) -> None:
        """``ValueError`` where the file is no such file, or cannot be written."""
        self._lock = threading.Lock()
        try:
            self._store = sqlite3.connect(
                path or ":memory:", timeout=60.0, check_same_thread=False, isolation_level=None
            )
            with self._lock:
                self._store.executescript(_TABLES)
        except sqlite3.Error as error:
            raise ValueError(
                f"task.options.judge.cache: {path} cannot be used ({error}); name a file that is new or made by this"
            ) from error

    def get(self, asked: str) -> str | None:
        """What was said to the question of this hash."""
        found = self._run("SELECT said FROM answers WHERE asked = ?", asked)
        return str(found[0][0]) if found else None

    def put(self, asked: str, said: str) -> None:
        """Keep an answer; of two at once the first."""
        self._run("INSERT OR IGNORE INTO answers VALUES (?, ?)", asked, said)

    def spend(self, budget: int | None) -> bool:
        """Count one request; ``False`` where there have been ``budget`` already."""
        return bool(
            self._run("UPDATE sent SET requests = requests + 1 WHERE ? OR requests < ? RETURNING requests",
                      budget is None, budget or 0)
        )  # fmt: skip

    def spent(self) -> int:
        """Requests so far."""
        return int(str(self._run("SELECT requests FROM sent")[0][0]))

    def _run(self, statement: str, *values: object) -> list[tuple[object, ...]]:
        with self._lock:
            return self._store.execute(statement, values).fetchall()
