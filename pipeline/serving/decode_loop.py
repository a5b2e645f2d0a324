"""Runs the engine of a server while there is work: rows enter and leave between its steps.

Steps run in one thread of their own; requests are read, and replies written, in the event loop meanwhile. A row whose
client is gone leaves at the next step, and a client that reads slowly holds nobody up: what it has not read waits in
its own queue.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from latent_control.decoding.stream_engine import StreamEngine
from latent_control.decoding.stream_rows import NewToken
from latent_control.decoding.token_scores import TokenScore
from latent_control.text import spoken_text
from rollout_workers.openai_api.errors import RefusedRequest
from rollout_workers.openai_api.protocol import DecodedRow, DecodeRequest
from rollout_workers.openai_api.text_stream import TextStream, push_all

_log = logging.getLogger(__name__)
_LONGEST_WAIT = 60
"""Seconds that a client is told to wait at most."""
Deliveries = list[tuple[Callable[[Any], object], Any]]
"""What the event loop is to call, and with what."""


@dataclass(kw_only=True, eq=False)
class DecodingRow:
    """A row on its way: what is asked, and who hears of each token.

    ``stream`` ``None``: nobody looks at the text before the end.
    """

    ask: DecodeRequest
    stream: TextStream | None
    heard: Callable[[DecodedRow], object] | None = None
    """Called in the event loop with what is new; ``text`` is all of it that is sure"""
    whole: DecodedRow = field(default_factory=DecodedRow)

    def take(self, new: NewToken) -> DecodedRow:
        """Keep a token; what is new."""
        part = DecodedRow(
            text="" if self.stream is None else self.stream.safe(),
            tokens=[new.token],
            codes=[new.code],
            code_logp=[new.code_logp],
            scores=[] if new.score is None else [new.score],
            codes_left=[] if self.ask.grammar is None else [new.codes_left],
        )
        self.whole.add(part)
        return part


@dataclass(kw_only=True, eq=False)
class _Job:
    row: DecodingRow
    future: asyncio.Future[DecodedRow]
    begun: float
    number: int | None = None

    def enter(self, number: int) -> None:
        self.number = number


Scoring = Iterator[list[TokenScore]]


class DecodeLoop:
    """``answer = await loop.decode(row)``, for any number of rows at once; used from one event loop at a time."""

    def __init__(self, make_engine: Callable[[], StreamEngine], tokenizer: Any, queue: int) -> None:
        """``queue``: rows that may wait for a slot."""
        self.make_engine, self.tokenizer, self.queue = make_engine, tokenizer, queue
        self.engine = make_engine()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self.arriving, self.leaving = deque[_Job](), deque[_Job]()
        self.jobs: dict[int, _Job] = {}
        self.scoring: deque[tuple[Scoring, list[TokenScore], asyncio.Future[list[TokenScore]]]] = deque()
        self.task: asyncio.Task[None] | None = None
        self.tokens, self.row_seconds = 0, 1.0

    # -- in the event loop -------------------------------------------------------------------------------------------

    def state(self) -> dict[str, int]:
        """Rows being decoded, rows waiting for a slot, and tokens decoded so far."""
        waiting = self.engine.waiting + len(self.arriving)
        return {"rows": len(self.engine.rows) - self.engine.waiting, "waiting": waiting, "tokens": self.tokens}

    def require_room(self, rows: int) -> None:
        """``RefusedRequest`` (429; 400 where they never fit) where more rows would wait than may."""
        if rows > (most := self.queue + self.engine.slots):
            raise RefusedRequest(f"the request has {rows} rows, and {most} fit here at most: send fewer", param="n")
        state = self.state()
        if state["waiting"] + rows <= self.queue + max(0, self.engine.slots - state["rows"]):
            return
        seconds = math.ceil(self.row_seconds * (1 + state["waiting"] / self.engine.slots))
        seconds = min(_LONGEST_WAIT, max(1, seconds))
        raise RefusedRequest(
            f"{state['waiting']} rows are waiting here, and the request has {rows} more: try again in {seconds} s",
            429,
            headers={"retry-after": str(seconds)},
        )

    async def decode(self, row: DecodingRow) -> DecodedRow:
        """A row's answer; a caller that is cancelled takes the row along.

        Raises:
            RefusedRequest: decoding failed.
        """
        job = _Job(row=row, future=asyncio.get_running_loop().create_future(), begun=time.monotonic())
        self.arriving.append(job)
        self._wake()
        try:
            return await job.future
        finally:
            if job.future.cancelled():
                self.leaving.append(job)

    async def score(self, parts: Scoring) -> list[TokenScore]:
        """All of what ``parts`` computes, a part between two steps of the engine.

        Raises:
            RefusedRequest: it failed.
        """
        future: asyncio.Future[list[TokenScore]] = asyncio.get_running_loop().create_future()
        self.scoring.append((parts, [], future))
        self._wake()
        return await future

    def _wake(self) -> None:
        loop = asyncio.get_running_loop()
        if self.task is None or self.task.done() or self.task.get_loop() is not loop:
            self.task = loop.create_task(self._run())
            self.task.add_done_callback(_log_failure)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self.arriving or self.leaving or self.jobs or self.scoring:
                for call, argument in await loop.run_in_executor(self.thread, self._turn):
                    call(argument)
        finally:
            self._give_up()

    def _give_up(self) -> None:
        """Whoever still waits hears that decoding failed, and a new engine is made: at the end nobody does."""
        left = [job.future for job in (*self.jobs.values(), *self.arriving)]
        left += [future for *_, future in self.scoring]  # type: ignore[misc]
        if not left:
            return
        for future in left:
            if not future.done():
                future.set_exception(RefusedRequest("decoding failed: the server's log says why", 500))
        self.jobs, self.engine = {}, self.make_engine()
        self.arriving.clear()
        self.leaving.clear()
        self.scoring.clear()

    # -- in the decoding thread --------------------------------------------------------------------------------------

    def _turn(self) -> Deliveries:
        """Let rows in and out, one step, a part of a scoring."""
        while self.arriving:
            job = self.arriving.popleft()
            if not job.future.done():
                number = self.engine.add(job.row.ask)
                job.enter(number)
                self.jobs[number] = job
        while self.leaving:
            job = self.leaving.popleft()
            if job.number is not None and self.jobs.pop(job.number, None) is not None:
                self.engine.remove(job.number)
        return self._told(self.engine.step()) + self._scored()

    def _told(self, news: Sequence[NewToken]) -> Deliveries:
        jobs, told = [self.jobs[new.row] for new in news], Deliveries()
        watched = [(job.row.stream, new.token) for job, new in zip(jobs, news, strict=True) if job.row.stream]
        push_all([stream for stream, _ in watched], [token for _, token in watched])
        for job, new in zip(jobs, news, strict=True):
            part, finish, row = job.row.take(new), new.finish, job.row
            if row.stream is not None and row.stream.stopped:
                finish = "stop"
                self.engine.remove(new.row)
            if row.heard is not None:
                told.append((row.heard, part))
            if finish is not None:
                del self.jobs[new.row]
                written = row.whole.tokens
                row.whole.close(spoken_text(self.tokenizer, written) if row.stream is None else row.stream.text, finish)
                self.row_seconds += 0.1 * (time.monotonic() - job.begun - self.row_seconds)
                told.append((_answer(job.future), row.whole))
        self.tokens += len(news)
        return told

    def _scored(self) -> Deliveries:
        if not self.scoring:
            return []
        parts, found, future = self.scoring[0]
        with torch.no_grad():
            part = None if future.done() else next(parts, None)
        if part is not None:
            found += part
            self.scoring.rotate(-1)  # prompts take turns
            return []
        self.scoring.popleft()
        return [(_answer(future), found)]


def _answer(future: asyncio.Future[Any]) -> Callable[[Any], None]:
    """Sets a future's result unless its caller is gone."""

    def answer(result: Any) -> None:
        if not future.done():
            future.set_result(result)

    return answer


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("decoding failed", exc_info=error)
