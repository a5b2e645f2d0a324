"""``serve``: a service on Ray Serve, by default on this machine only."""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.install import install_command
from configs.schema import Decode
from latent_control.pretrained import base_path, read_shape
from pipeline.cluster.connect import joined
from pipeline.runs import interrupts
from pipeline.serving.bank import WORLD, is_bank, read_index
from pipeline.serving.export import is_export, weight_problems

if TYPE_CHECKING:
    from starlette.types import ASGIApp

OPEN_REQUESTS = 1 << 14
"""Of a replica, which turns away itself what is too much for it (429)."""


@dataclass(frozen=True, kw_only=True)
class ServingSettings:
    """``ServingSettings(folder=Path("exported"), name="first")``: one replica on one CPU, reached from this
    machine only."""

    folder: Path
    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    batch_size: int = 256
    """Rows decoded together, at most"""
    queue: int = 1024
    """Rows that may wait for a place among these; more are refused (429)"""
    threads: int = 1
    gpus: float = 0.0
    """Of one replica"""
    address: str = "local"
    """Of the Ray cluster"""
    decode: Decode | None = None
    """Where a request does not say; ``None``: as the export says"""
    base: str | None = None
    metrics_port: int | None = None
    """Where a local Ray answers Prometheus"""
    key: str | None = field(default=None, repr=False)
    """Digest of the API key that requests must send (``key_digest``); ``None``: none"""


def check(settings: ServingSettings) -> None:
    """``ValueError`` for what would fail only in a replica."""
    bank = is_bank(settings.folder)
    folder = settings.folder / WORLD if bank else settings.folder
    if not is_export(folder):
        raise ValueError(f"{settings.folder} is not an export; make one with latent-control export RUN -o FOLDER")
    if damaged := weight_problems(folder):
        raise ValueError(f"{folder} is damaged ({damaged[0]}): export it again")
    read_shape(folder)
    if bank and not read_index(settings.folder).members:
        raise ValueError(f"{settings.folder} has no members: latent-control bank add {settings.folder} NAME RUN")
    base = settings.base or base_path(folder)
    if base.startswith(("/", ".")) and not Path(base).is_dir():
        raise ValueError(
            f"the base LM of {settings.folder} lay at {base}, where it is no longer: say where it is now "
            "with --base FOLDER"
        )
    try:
        from ray import serve
    except ImportError as error:
        raise ValueError(f"Ray Serve is not installed ({error.name}): {install_command('serve')}") from error
    del serve


def require_api_key(key: str) -> str:
    """The digest of an API key; ``ValueError``, which does not quote it, where no header can carry it."""
    from rollout_workers.openai_api.keys import key_digest

    if not key.strip() or key != key.strip() or not key.isascii() or not key.isprintable():
        raise ValueError("--api-key is empty, or has spaces around it or letters beyond ASCII: give a plain one")
    return key_digest(key)


def require_port(settings: ServingSettings) -> None:
    """``ValueError`` when the address cannot be bound to (on a cluster that is the head node's business)."""
    if settings.address != "local":
        return
    try:
        with socket.create_server((settings.host, settings.port)):
            pass
    except OSError as error:
        raise ValueError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror}): give another --port or --host"
        ) from error


def application(settings: ServingSettings) -> Any:
    """The Ray Serve application."""
    from ray import serve

    from pipeline.serving import web
    from pipeline.serving.service import Service
    from rollout_workers import telemetry

    @serve.deployment(
        name="latent-control",
        num_replicas=settings.replicas,
        max_ongoing_requests=OPEN_REQUESTS,
        ray_actor_options={"num_cpus": settings.threads, "num_gpus": settings.gpus},
    )
    @serve.ingress()
    class Replica:
        def __init__(self) -> None:
            import torch

            torch.set_num_threads(settings.threads)
            self.service = Service(
                settings.folder,
                settings.name,
                device="cuda" if settings.gpus else "cpu",
                base=settings.base,
                decode=settings.decode,
                slots=settings.batch_size,
                queue=settings.queue,
            )

        def __serve_build_asgi_app__(self) -> ASGIApp:
            def told(status: int, seconds: float, tokens: int) -> None:
                telemetry.count("server_requests_total", model=settings.name, status=str(status))
                telemetry.count("server_tokens_total", tokens, model=settings.name)
                telemetry.seconds("server_request_seconds", seconds, model=settings.name)

            return web.application(self.service, key=settings.key, told=told)

    return Replica.bind()  # type: ignore[attr-defined]


@contextmanager
def running(settings: ServingSettings) -> Iterator[str]:
    """The application on Ray for the duration of a block; yields its address."""
    from ray import serve

    with joined(settings.address, settings.replicas * settings.threads + 1, settings.metrics_port):
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(http_options={"host": settings.host, "port": settings.port})
        try:
            try:
                serve.run(application(settings), name="latent-control", route_prefix="/")
            except RuntimeError as error:
                raise ValueError(
                    f"the service did not start: {str(error).strip().rpartition(chr(10))[2][:300]}"
                ) from error
            yield f"http://{settings.host}:{settings.port}"
        finally:
            serve.shutdown()


def serve_forever(settings: ServingSettings, say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        ValueError: the replica or the HTTP server does not start.
    """
    try:
        with ExitStack() as stack:
            # Ray Serve puts handlers of its own there, which would end us without tidying up.
            with interrupts.through_replacement():
                address = stack.enter_context(running(settings))
            say(
                f"{settings.name} answers at {address}/v1/completions; {reach(settings.host, settings.key is not None)}"
            )
            say("stop with Ctrl-C")
            threading.Event().wait()
    except KeyboardInterrupt:
        say("stopped")


def reach(host: str, keyed: bool = False) -> str:
    """Who can connect; ``keyed``: whether requests must send an API key."""
    if host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback):
        return "reached from this machine only (--host 0.0.0.0 opens it to the network)"
    if keyed:
        return f"open to everyone who reaches {host} and has the key: there is no encryption, put a proxy before it"
    return f"open to everyone who reaches {host}: there is no password and no encryption, put a proxy before it"


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
