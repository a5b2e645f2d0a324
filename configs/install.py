"""The command that installs what is missing: in a checkout with its tested versions, else from the wheel's name."""

from __future__ import annotations

from pathlib import Path

LOCK = Path(__file__).resolve().parents[1] / "requirements.lock"
"""In a checkout; a wheel has none."""


def install_command(extra: str = "") -> str:
    """``pip install -c requirements.lock -e '.[tasks]'``, or ``pip install 'latent-control[tasks]'`` outside a
    checkout."""
    options = f"[{extra}]" if extra else ""
    if not LOCK.is_file():
        return f"pip install 'latent-control{options}'"
    return "pip install -c requirements.lock -e " + (f"'.{options}'" if extra else ".")
