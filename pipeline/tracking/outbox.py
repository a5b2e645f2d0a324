"""A queue of calls to the tracking store and its thread, which retries them while the store is away."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from configs.redaction import without_secrets
from rollout_workers import telemetry

AWAY_SECONDS = 2.0
"""How long ``drained`` waits when the store did not answer before."""
_FIRST_RETRY, _LONGEST_RETRY = 1.0, 30.0
_HOPELESS = frozenset(
    {
        "INVALID_PARAMETER_VALUE",
        "BAD_REQUEST",
        "MALFORMED_REQUEST",
        "PERMISSION_DENIED",
        "UNAUTHENTICATED",
        "NOT_IMPLEMENTED",
        "RESOURCE_DOES_NOT_EXIST",
        "RESOURCE_ALREADY_EXISTS",
        "ENDPOINT_NOT_FOUND",
        "INVALID_STATE",
    }
)
"""MLflow's error codes of calls that no retry can help."""
_LOG = logging.getLogger(__name__)


class Outbox(threading.Thread):
    """Makes the calls in order and retries while the store is away."""

    def __init__(self, note: Callable[[str, str], None]) -> None:
        super().__init__(name="tracking", daemon=True)
        self._note = note
        self._calls: deque[tuple[str, Callable[[], None]]] = deque()
        self._changed = threading.Condition()
        self._hurry = threading.Event()
        self._away = False
        self._closed = False
        self._refused: list[str] = []

    def put(self, what: str, call: Callable[[], None]) -> None:
        """Queue a call; ``what`` names it in a warning."""
        with self._changed:
            self._calls.append((what, call))
            telemetry.gauge("tracking_waiting", len(self._calls))
            self._changed.notify_all()

    def drained(self, seconds: float) -> bool:
        """Wait for an empty queue, at most ``seconds`` (``AWAY_SECONDS`` while the store is away); whether it is."""
        begun = time.monotonic()
        self._hurry.set()
        with self._changed:
            while (
                self._calls
                and self.is_alive()
                and time.monotonic() - begun < (min(seconds, AWAY_SECONDS) if self._away else seconds)
            ):
                self._changed.wait(0.1)
            return not self._calls

    def lost(self) -> str:
        """What the store has not: calls that it refused, and those that still wait; "" when it has all."""
        with self._changed:
            waiting, refused = len(self._calls), list(self._refused)
        said = [f"{waiting} records wait for it"] if waiting else []
        said += [f"it refused {len(refused)}, first {refused[0]}"] if refused else []
        return " and ".join(said)

    def close(self) -> None:
        """End the thread once the queue is empty."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def run(self) -> None:
        """The thread."""
        pause = _FIRST_RETRY
        while True:
            with self._changed:
                while not self._calls and not self._closed:
                    self._changed.wait()
                if not self._calls:
                    return
                what, call = self._calls[0]
            if self._attempt(what, call):
                pause = _FIRST_RETRY
                with self._changed:
                    self._calls.popleft()
                    telemetry.gauge("tracking_waiting", len(self._calls))
                    self._changed.notify_all()
            else:
                self._hurry.wait(pause)
                self._hurry.clear()
                pause = min(_LONGEST_RETRY, 2 * pause)

    def _attempt(self, what: str, call: Callable[[], None]) -> bool:
        """Make a call; whether it succeeded or no retry can help."""
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            call()
        except (MlflowException, OSError, SQLAlchemyError, ValueError, ImportError) as error:
            reason = without_secrets(str(error)).strip().partition("\n")[0][:200]
            # Failures of the network are OSErrors, also the one that is a ValueError: an answer that is not JSON.
            ours = isinstance(error, FileNotFoundError | ImportError) or (
                isinstance(error, ValueError) and not isinstance(error, OSError)
            )
            hopeless = ours or getattr(error, "error_code", "") in _HOPELESS
            if hopeless:
                _LOG.warning("tracking: %s was not stored: %s", what, reason)
                self._refused.append(f"{what} ({reason})")
            elif not self._away:
                _LOG.warning(
                    "tracking: the store is away (%s): %s; training goes on, metrics are kept and sent later",
                    what,
                    reason,
                )
                self._note("tracking_away", f"the MLflow store is away: {reason}")
            self._away = self._away or not hopeless
            return hopeless
        if self._away:
            self._away = False
            _LOG.warning("tracking: the store is back")
            self._note("tracking_back", "the MLflow store is back")
        return True
