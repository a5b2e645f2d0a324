"""An offline stage on several Ray Train workers."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch

from configs.schema import Training
from pipeline.runs import interrupts
from pipeline.runs.layout import RAY_TRAIN
from pipeline.stages.offline_job import Log, OfflineJob
from pipeline.stages.offline_work import work


def run_workers(job: OfflineJob, log: Log) -> None:
    """Data-parallel training on Ray Train workers; the first one's log lines come back through a queue.

    Raises:
        Whatever a worker raised.
    """
    from ray.train import RunConfig as TrainRunConfig
    from ray.train import ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchTrainer
    from ray.util.queue import Queue

    queue = Queue(actor_options={"num_cpus": 0})
    scaling = ScalingConfig(
        num_workers=job.settings.num_workers,
        use_gpu=job.settings.gpus_per_worker > 0,
        resources_per_worker=resources(job.settings),
    )
    trainer = TorchTrainer(
        worker_loop,
        train_loop_config={"job": job, "queue": queue},
        scaling_config=scaling,
        run_config=TrainRunConfig(name=job.stage, storage_path=str(Path(job.checkpoints).parent / RAY_TRAIN)),
    )
    finished = threading.Event()
    reader = threading.Thread(target=forward, args=(queue, log, finished), daemon=True)
    reader.start()
    try:
        with interrupts.at_once():  # the workers receive no signal; their last checkpoint stays
            trainer.fit()
    except WorkerGroupError as error:
        # Ray Train wraps what happened in a worker in its own report of it.
        raise next((getattr(e, "_base_exc", e) for e in error.worker_failures.values()), error) from error
    finally:
        finished.set()
        reader.join()
        queue.shutdown()


def resources(settings: Training) -> dict[str, float]:
    """What one training worker reserves."""
    return {"CPU": 1.0} | ({"GPU": float(settings.gpus_per_worker)} if settings.gpus_per_worker else {})


def forward(queue: Any, log: Log, finished: threading.Event) -> None:
    """Hand queued log lines on until training has finished and the queue is empty."""
    from ray.util.queue import Empty

    while True:
        try:
            log(*queue.get(timeout=0.2))
        except Empty:
            if finished.is_set():
                return


def worker_loop(arguments: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    torch.set_num_threads(1)
    work(arguments["job"], lambda update, metrics: arguments["queue"].put((update, metrics)))
