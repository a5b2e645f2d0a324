"""The replay buffer as a Ray actor: rollouts go from worker to disk without passing the driver."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.replay.writer import Added, ReplayWriter
from rollout_workers import telemetry


class ReplayActor:
    """A ``ReplayWriter`` behind object references: rollouts go from worker to disk without passing the driver.

    Wrap it: ``ray.remote(num_cpus=0, max_restarts=-1)(ReplayActor).remote(folder, rows_per_shard, run_id)``.
    """

    def __init__(self, folder: Path, rows_per_shard: int, run_id: str) -> None:
        self._writer = ReplayWriter(folder, rows_per_shard, run_id)
        self._run, self._incarnation = run_id, uuid.uuid4().hex

    def add(self, refs: Sequence[Any]) -> Added:
        """Store the lists of rollouts behind ``refs`` (handed over inside a list, so that Ray does not fetch them
        early)."""
        import ray
        from ray.exceptions import ObjectLostError

        rows, duplicates, lost = 0, 0, []
        for ref in refs:
            try:
                added = self._writer.add(ray.get(ref))
            except ObjectLostError as error:
                lost.append(str(error).partition("\n")[0])
                continue
            rows, duplicates = rows + added.rows, duplicates + added.duplicates
        telemetry.count("replay_rows_total", rows, run=self._run)
        return Added(rows=rows, duplicates=duplicates, lost=tuple(lost), actor=self._incarnation)

    def flush(self) -> Added:
        """Write all rows to the disk; ``rows`` counts those stored so far."""
        self._writer.flush()
        return Added(rows=self._writer.rows, duplicates=0, actor=self._incarnation)


class BufferPlace(NamedTuple):
    """A replay buffer: the arguments of its ``ReplayActor``."""

    folder: str
    rows_per_shard: int
    run_id: str


class SharedReplayActor:
    """``ReplayActor`` for many runs: a process for each would cost more than what it does."""

    def __init__(self) -> None:
        self._of: dict[BufferPlace, ReplayActor] = {}

    def add(self, buffer: BufferPlace, refs: Sequence[Any]) -> Added:
        """As of ``ReplayActor``."""
        return self._writer(buffer).add(refs)

    def flush(self, buffer: BufferPlace) -> Added:
        """As of ``ReplayActor``."""
        return self._writer(buffer).flush()

    def close(self, buffer: BufferPlace) -> None:
        """Forget what was not flushed."""
        self._of.pop(buffer, None)

    def _writer(self, buffer: BufferPlace) -> ReplayActor:
        if buffer not in self._of:
            self._of[buffer] = ReplayActor(Path(buffer.folder), buffer.rows_per_shard, buffer.run_id)
        return self._of[buffer]


def beside_driver(kind: type) -> Any:
    """An actor class that restarts, and drops what it has written already. It stays on the driver's node: another one,
    once lost, would take along what is not on the disk yet."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(kind)


class ReplayHandle:
    """What a run asks of its ``ReplayActor``."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def add(self, refs: Sequence[Any]) -> Any:
        """Store the lists of rollouts behind ``refs``; a reference to ``Added``."""
        return self.actor.add.remote(refs)

    def flush(self) -> Any:
        """Write all to the disk; a reference to ``Added``."""
        return self.actor.flush.remote()

    def stop(self) -> None:
        """End the actor; ``flush`` first what is to be kept."""
        import ray

        ray.kill(self.actor)  # two that write one replay buffer would be one too many


class SharedReplayHandle(ReplayHandle):
    """What a run asks of a ``SharedReplayActor``."""

    def __init__(self, actor: Any, buffer: BufferPlace) -> None:
        super().__init__(actor)
        self.buffer = buffer

    def add(self, refs: Sequence[Any]) -> Any:
        """Store the lists of rollouts behind ``refs``; a reference to ``Added``."""
        return self.actor.add.remote(self.buffer, refs)

    def flush(self) -> Any:
        """Write all to the disk; a reference to ``Added``."""
        return self.actor.flush.remote(self.buffer)

    def stop(self) -> None:
        """Forget what was not flushed; the actor goes on for the others."""
        self.actor.close.remote(self.buffer)
