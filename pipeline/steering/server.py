"""Serves the steering page, by default on this machine only and at a free port."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Callable
from contextlib import suppress

import uvicorn

from pipeline.steering.guard import Application

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


def server_of(application: Application) -> uvicorn.Server:
    """The HTTP server, not started."""
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
    return uvicorn.Server(config)


def serve(application: Application, listener: socket.socket, say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    say(f"steering page: http://{shown}:{port}  ({reach(host)})")
    say("stop with Ctrl-C")
    with suppress(KeyboardInterrupt):  # uvicorn stops in order, then passes the signal on
        server_of(application).run(sockets=[listener])
    say("stopped")


def reach(host: str) -> str:
    """Who can connect."""
    if is_loopback(host):
        return "reached from this machine only"
    return f"open to everyone who reaches {host}: no password, no encryption; anyone there can use the model"
