"""Serves a local page, by default on this machine only and at a free port."""

from __future__ import annotations

import errno
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import uvicorn

from pipeline.web.guard import Application

FIRST_PORT, TRIED = 8080, 100
HEADER_BYTES, IDLE_SECONDS, CONNECTIONS = 16 << 10, 5, 64


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens at ``port``, or at the first free one from 8080 on.

    Raises:
        ValueError: ``port`` is taken, or ``host`` is no address of this machine.
    """
    start = FIRST_PORT if port is None else port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for number in range(start, start + (TRIED if port is None else 1)):
        try:
            return socket.create_server((host, number), family=family)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ValueError(
                    f"cannot listen on {host}:{number} ({error.strerror or error}): give another --host or --port"
                ) from error
    taken = f"port {start} is taken" if port is not None else f"the ports {start} to {start + TRIED - 1} are taken"
    raise ValueError(
        f"{taken} on {host}: give another --port" + ("" if port is None else ", or none: then a free one is looked for")
    )


def names_of(host: str) -> frozenset[str]:
    """What a service at ``host`` may be called in requests, besides a number."""
    return frozenset({"localhost"} if is_loopback(host) else {"localhost", socket.gethostname().lower(), host.lower()})


class LocalServer(uvicorn.Server):
    """A server that tells ``ending`` before it waits for open streams, which else would never end."""

    def __init__(self, config: uvicorn.Config, ending: threading.Event) -> None:
        super().__init__(config)
        self._ending = ending

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come."""
        self._ending.set()
        super().handle_exit(sig, frame)


def server_of(application: Application, ending: threading.Event | None = None) -> LocalServer:
    """The HTTP server, not started; ``ending`` is set when a signal ends it."""
    config = uvicorn.Config(
        application,
        log_level="warning",
        ws="none",
        lifespan="off",
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=IDLE_SECONDS,
        h11_max_incomplete_event_size=HEADER_BYTES,
        http="h11",
    )
    return LocalServer(config, ending or threading.Event())


def address_of(listener: socket.socket, token: str) -> str:
    """The link to the page: ``http://127.0.0.1:8080/TOKEN/``."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/{token}/"


def serve(
    page: str,
    application: Application,
    listener: socket.socket,
    token: str,
    say: Callable[[str], None],
    ending: threading.Event | None = None,
) -> None:
    """Serve ``page`` ("steering page") until Ctrl-C, SIGTERM or SIGHUP."""
    say(f"{page}: {address_of(listener, token)}  ({reach(listener.getsockname()[0])})")
    say("stop with Ctrl-C")
    server = server_of(application, ending)
    before = signal.signal(signal.SIGHUP, server.handle_exit)  # a closed terminal; uvicorn knows the other two
    try:
        with suppress(KeyboardInterrupt):  # uvicorn stops in order, then passes the signal on
            server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGHUP, before)
    say("stopped")


def reach(host: str) -> str:
    """Who can connect."""
    if is_loopback(host):
        return "reached from this machine only"
    return f"open to everyone who reaches {host} and has this link: no encryption; anyone there can use the page"
