"""Known weaknesses of the locked dependencies, by pip-audit: exit 1 where there are some, 0 otherwise, and it says what
was not looked up.

Usage: python .ci/dependency_audit.py requirements.lock      (pip-audit beside this interpreter)

Where the source of advisories does not answer, nothing is looked up after the first package, and that is said: a build
without network neither fails nor waits.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SECONDS = 300


def audited(pins: list[str]) -> list[dict[str, Any]]:
    """pip-audit's word on each of these ``name==version``; empty where it has none in time."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(pins) + "\n")
        file.flush()
        options = [
            "--no-deps",
            "--disable-pip",
            "--progress-spinner",
            "off",
            "--timeout",
            "10",
            "--format",
            "json",
            "-r",
            file.name,
        ]
        command = [sys.executable, "-m", "pip_audit", *options]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
            found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
        except (subprocess.TimeoutExpired, ValueError, LookupError):
            return []
    return found


def main() -> int:
    """Look up one package, then all if that had an answer."""
    lines = Path(sys.argv[1]).read_text().splitlines()
    pins = [line.strip() for line in lines if "==" in line and not line.startswith("#")]
    probe = audited(pins[:1])
    if not probe or "skip_reason" in probe[0]:
        print(f"skipped: the source of advisories does not answer, {len(pins)} dependencies were not looked up")
        return 0
    found = audited(pins)
    weak = [one for one in found if one.get("vulns")]
    for one in weak:
        for weakness in one["vulns"]:
            print(
                f"{one['name']} {one['version']}: {weakness['id']}, repaired in "
                f"{', '.join(weakness['fix_versions']) or 'no version'}"
            )
    skipped = [one["name"] for one in found if "skip_reason" in one]
    print(f"{len(found) - len(skipped)} of {len(pins)} dependencies looked up, {len(weak)} with known weaknesses")
    if skipped:
        print(f"not looked up: {', '.join(skipped)}")
    return int(bool(weak))


if __name__ == "__main__":
    sys.exit(main())
