"""Serving: many streams at once through Ray Serve and OpenAI's protocol, on the tiny base LM (64 codes).

    python benchmarks/serving.py [--clients 20 200] [--tokens 128] [--requests 2000] [--without-ray] [--repeats 3]
                                 [--quick] [--out DIR]

Each client holds one connection after the other open, reads its stream to the end and asks for the next one, until
``requests`` streams were asked for in all; every stream is ``tokens`` long, the prompts differ. The number of clients
changes from round to round. A client is 20 lines over a socket; it shares the cores with the server.
Columns: tokens per second of all streams together; of the streams that began in the middle of the round, when all
clients were at work, the slowest one's time from request to last token over the median, and the median time to the
first token; streams that failed. ``--without-ray`` has the same application behind uvicorn in a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import multiprocessing
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common import alternate, arguments, ratio, report, spread
from models import endless

from pipeline.serving import deploy
from pipeline.serving.export import Source, export


class Stream(NamedTuple):
    """Of one stream: seconds of the clock at its request, first token, end; tokens (0: it failed)."""

    begun: float
    first: float
    ended: float
    tokens: int


async def one_stream(port: int, number: int, tokens: int) -> Stream:
    """Ask for a stream and read it to its end."""
    asked = {"prompt": f"{number % 90 + 1} {number // 90 % 90 + 1} 7", "max_tokens": tokens, "temperature": 1.0}
    asked |= {"seed": number, "stream": True, "stream_options": {"include_usage": True}}
    body, begun, first, last = json.dumps(asked).encode(), time.perf_counter(), 0.0, b""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
    writer.write(head + body)
    while part := await reader.read(1 << 16):
        first = first or time.perf_counter()
        last = last[-2000:] + part
    writer.close()
    done = b"data: [DONE]" in last and b'"completion_tokens": ' in last
    new = int(last.rpartition(b'"completion_tokens": ')[2].partition(b",")[0]) if done else 0
    return Stream(begun, first, time.perf_counter(), new)


async def load(port: int, clients: int, tokens: int, requests: int) -> list[Stream]:
    """``requests`` streams by so many clients."""
    numbers, streams = iter(range(requests)), list[Stream]()

    async def client() -> None:
        for number in numbers:
            streams.append(await one_stream(port, number, tokens))

    await asyncio.gather(*(client() for _ in range(clients)))
    return streams


def by_uvicorn(folder: Path, port: int) -> None:
    """Serve until the process is ended."""
    import torch
    import uvicorn

    from pipeline.serving.service import Service
    from pipeline.serving.web import application

    torch.set_num_threads(1)
    uvicorn.run(application(Service(folder, "tiny", device="cpu")), port=port, log_level="error")


@contextlib.contextmanager
def served(folder: Path, port: int, *, ray: bool) -> Iterator[None]:
    """The export, answering."""
    if ray:
        with deploy.running(dataclasses.replace(deploy.ServingSettings(folder=folder, name="tiny"), port=port)):
            yield
        return
    process = multiprocessing.get_context("spawn").Process(target=by_uvicorn, args=(folder, port))
    process.start()
    try:
        while process.is_alive():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.join()


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[20, 200])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--without-ray", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.clients, options.tokens, options.requests = [2, 6], 8, 12
    measured: dict[str, list[dict[str, float]]] = {str(clients): [] for clients in options.clients}
    with tempfile.TemporaryDirectory() as work:
        folder = export(Source(checkpoint=endless(Path(work)), run_dir=None), Path(work) / "export")
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        with served(folder, port, ray=not options.without_ray):

            def side(clients: int) -> float:
                streams = asyncio.run(load(port, clients, options.tokens, options.requests))
                begun, ended = min(s.begun for s in streams), max(s.ended for s in streams)
                # Neither those that all began at once nor those that had the server for themselves.
                middle = sorted(streams)[len(streams) // 4 : -len(streams) // 4] or streams
                seconds = [s.ended - s.begun for s in middle]
                found = {
                    "tokens_per_second": sum(s.tokens for s in streams) / (ended - begun),
                    "slowest_over_median": max(seconds) / statistics.median(seconds),
                    "first_token_seconds": statistics.median(s.first - s.begun for s in middle),
                    "failed": sum(s.tokens != options.tokens for s in streams),
                }
                measured[str(clients)].append(found)
                print(clients, found, flush=True)
                return found["tokens_per_second"]

            rates = alternate({str(n): lambda n=n: side(n) for n in options.clients}, options.repeats)
    rows: list[dict[str, Any]] = []
    for clients, found in measured.items():
        counted = found[1:]  # the first warms up
        over = ratio(rates[clients], rates[str(options.clients[0])])
        rows.append(
            {
                "streams at once": clients,
                "tokens/s": spread(rates[clients]),
                f"over {options.clients[0]} streams": f"{over['median']:.2f} ({over['min']:.2f} - {over['max']:.2f})",
                "slowest / median": spread([one["slowest_over_median"] for one in counted]),
                "first token, s": spread([one["first_token_seconds"] for one in counted]),
                "failed": int(sum(one["failed"] for one in counted)),
            }
        )
    report("serving", rows, {"measured": measured}, options.out)


if __name__ == "__main__":
    main()
