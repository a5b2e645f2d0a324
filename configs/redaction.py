"""Takes secrets out of texts and environments: of URLs (passwords, tokens), and the values of variables that hold them.

What a run writes, prints or hands to programs of others goes through here; the user's own config alone keeps them.
"""

from __future__ import annotations

import os
import re
from urllib.parse import quote, unquote

HIDDEN = "***"
_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|_PAT)(_ID)?$", re.IGNORECASE)
# Also with one slash, as a path of the file system writes it.
_URL = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*)(?P<slashes>://?)(?P<rest>[^\s\"'<>`\\|]+)", re.IGNORECASE)
_PARAMETER = re.compile(
    r"([?&;#][^=&;#?]*(?:password|passwd|pwd|token|secret|key|signature|credential)[^=&;#?]*=)[^&;#\s]+",
    re.IGNORECASE,
)
_SHORTEST = 8
"""Characters of a variable's value that is looked for in texts: shorter ones are words such as false."""


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret, e.g. ``HF_TOKEN``, ``MLFLOW_TRACKING_PASSWORD``."""
    return _NAME.search(name) is not None


def without_secrets(text: str) -> str:
    """``text`` with ``***`` for the password of each URL in it, for a token in place of a user, for parameters of
    secret names, and for the values of this process's secret variables, percent-encoded or not."""
    text = _URL.sub(_without_secrets, text) if ":/" in text else text
    secrets = {value for name, value in os.environ.items() if is_secret(name) and len(value) >= _SHORTEST}
    for form in sorted(secrets | {quote(secret, safe="") for secret in secrets}, key=len, reverse=True):
        text = text.replace(form, HIDDEN)
    return text


def _without_secrets(found: re.Match[str]) -> str:
    scheme, slashes, rest = found.groups()
    place, mark, more = re.match(r"([^/?#]*)([/?#]?)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
    # A password may hold an unescaped @ or slash: what stands before the last @ of the path's begin belongs to it.
    if "@" not in place and (late := re.match(r"[^/?#@]*:[^?#]*@[^/?#@]+", rest)) and not re.match(r"[^/]*:\d+/", rest):
        place, mark, more = late[0], rest[late.end() : late.end() + 1], rest[late.end() + 1 :]
    user, at, host = place.rpartition("@")
    if at:
        name, colon, _ = user.partition(":")
        web = scheme.lower() in ("http", "https", "git+https", "git+http")
        place = f"{name if colon and unquote(name) else HIDDEN}:{HIDDEN}@{host}" if colon else place
        place = f"{HIDDEN}@{host}" if not colon and web else place
    return f"{scheme}{slashes}{place}" + _PARAMETER.sub(rf"\1{HIDDEN}", mark + more)


def public_environment() -> dict[str, str]:
    """This process's variables without those whose names or values hold secrets, for programs that are not ours."""
    return {
        name: value for name, value in os.environ.items() if not is_secret(name) and without_secrets(value) == value
    }
