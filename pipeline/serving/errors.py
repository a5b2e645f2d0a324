"""What a server answers instead of a reply, worded and shaped as OpenAI's errors."""

from __future__ import annotations

from typing import Any

from latent_control.text import whole_characters
from pipeline.web.questions import Refusal

_LONGEST = 1000
_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


class RefusedRequest(Refusal):
    """A request that cannot be served, with its HTTP status and the argument that is wrong.

    ``code``: OpenAI's word for the reason, where it has one; ``headers``: of the reply.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        *,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message, status)
        self.param, self.code, self.headers = param, code or _CODES.get(status), headers or {}

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's format; what it quotes of the request is cut, and whole characters."""
        said, param = (text and whole_characters(text[:_LONGEST]) for text in (str(self), self.param))
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": said, "type": kind, "param": param, "code": self.code}}
