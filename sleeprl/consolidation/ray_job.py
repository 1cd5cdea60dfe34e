"""Consolidation, and the baselines beside it, as Ray Train jobs.

A job's processes may be started before its work is known: ``TrainingProcesses`` import and wait, and
``run_job`` gives them the job.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sleeprl.cluster.failures import log_tail
from sleeprl.cluster.runtime import LEARNER_RESOURCE
from sleeprl.cluster.waits import WAITS, WaitKind, Watchdog
from sleeprl.config.schema import ResourcesConfig
from sleeprl.consolidation.job_channel import JobChannel, Work
from sleeprl.consolidation.train_loop import Job, TrainWorker, load_data_mix
from sleeprl.rollout.engine_pool import EnginePool
from sleeprl.trainer.options import TrainerOptions
from sleeprl.trainer.setup import warm_up
from sleeprl.trainer.teacher import launch_teachers

OnMetrics = Callable[[dict[str, Any]], None]
POLL_S = 0.2
"""Seconds between two looks at what the other side has to tell."""
CLOSE_TIMEOUT_S = 10.0
"""Seconds that workers without work may take to end."""


def limit_to_budget(job: Job, tokens: int) -> Job:
    """Return the same job for as many trained tokens.

    It gets the steps that its method needs for them, and stops at the budget where its texts turn out
    longer.
    """
    steps = max(1, math.ceil(tokens / load_data_mix(job).tokens_per_step()))
    warmup = min(job.learner.warmup, steps // 4)
    return replace(
        job, tokens=tokens, learner=replace(job.learner, total_steps=steps, warmup=warmup)
    )


class RayTrainBackend:
    """What a Ray Train worker keeps its checkpoints in, and tells its figures."""

    def __init__(self, channel: Any) -> None:
        """Args:
        channel: Handle of the job's ``JobChannel``; rank 0's figures go there.
        """
        self.channel = channel
        self.rank = ray.train.get_context().get_world_rank()

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        """Yield the directory of the last checkpoint, if there is one."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as directory:
            yield Path(directory)

    def save_checkpoint(self, step: int, directory: Path) -> None:
        """Let Ray Train put the directories of all ranks together as one checkpoint."""
        checkpoint = ray.train.Checkpoint.from_directory(directory)
        ray.train.report({"step": step}, checkpoint=checkpoint)

    def report(self, record: dict[str, Any]) -> None:
        """Send a record to the driver, from rank 0."""
        end = record.get("end")
        if self.rank == 0:
            sent = self.channel.put.remote(record)
            if end is not None:
                ray.get(sent)
        if end is not None:
            ray.train.report(end)


def _train_loop(arguments: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker.

    Args:
        arguments: ``channel``, and ``options``, those of the trainer to come.
    """
    backend = RayTrainBackend(arguments["channel"])
    backend.report({"pid": os.getpid()})
    WAITS.waiter = f"learner-{backend.rank}"
    work: Work | None = ray.get(backend.channel.work.remote())
    if work is None:
        warm_up(arguments["options"])
    while work is None:
        time.sleep(POLL_S)
        work = ray.get(backend.channel.work.remote())
    if work.job is None:
        return
    with Watchdog(WAITS, work.stall_seconds):
        worker = TrainWorker(work.job, work.engines, backend, work.teachers)
        backend.report({"ready": True})
        worker.run()


class TrainingProcesses:
    """The processes of one Ray Train job, which may be started before its work is known.

    Started again with the same ``storage`` and ``name`` after a crash, the job goes on from its last
    checkpoint.
    """

    def __init__(
        self, options: TrainerOptions, resources: ResourcesConfig, storage: Path, name: str
    ) -> None:
        """Start them in the background.

        Args:
            options: Those of the trainer, by which the processes know what to import.
            resources: Where they run, and how many.
            storage: Directory of all jobs' checkpoints.
            name: The job's directory in it.
        """
        # Where the driver is, not on a node that may be taken away.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.name, self.resources, self.gpu = name, resources, options.gpu
        self.channel = ray.remote(JobChannel).options(num_cpus=0, scheduling_strategy=here).remote()
        self.failures: list[BaseException] = []
        self.needs: dict[str, float] = {"CPU": resources.learner_cpus}
        if resources.learner_gpus:
            self.needs["GPU"] = resources.learner_gpus
        count: int | tuple[int, int] = resources.learner_workers
        if resources.elastic:
            # What engines hold counts as free with Ray Train (2.60); of this they hold nothing.
            self.needs[LEARNER_RESOURCE] = 1
            count = (resources.learner_workers, resources.learner_workers_max)
        self._trainer = TorchTrainer(
            _train_loop,
            train_loop_config={"channel": self.channel, "options": options},
            scaling_config=ScalingConfig(
                num_workers=count,
                use_gpu=resources.learner_gpus > 0,
                resources_per_worker=self.needs,
            ),
            torch_config=TorchConfig(backend="nccl" if resources.learner_gpus else "gloo"),
            run_config=RunConfig(
                name=name,
                storage_path=str(storage.resolve()),
                failure_config=FailureConfig(max_failures=resources.max_failures),
            ),
        )
        self.thread = threading.Thread(target=self._fit, name=f"train-{name}", daemon=True)
        self.thread.start()

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:
            self.failures.append(error)

    def close(self) -> None:
        """End processes that were given no work."""
        if self.thread.is_alive():
            ray.get(self.channel.give.remote(Work()))
            self.thread.join(CLOSE_TIMEOUT_S)
        ray.kill(self.channel)


def run_job(
    job: Job, processes: TrainingProcesses, engines: EnginePool, on_metrics: OnMetrics
) -> dict[str, Any]:
    """Give the processes their job, and follow it to its end.

    Args:
        job: What to train.
        processes: Started with the options of the job's trainer; they are gone afterwards.
        engines: They get the weights, and write the roll-outs.
        on_metrics: Called with the record of each step, in order.

    Returns:
        ``step``, ``tokens``, ``version``, and which engines are ``verified`` at it.

    Raises:
        Exception: What Ray Train raises when the job has failed for good.
    """
    resources, options = processes.resources, job.learner
    teachers = launch_teachers(
        resources, options.checkpoint, options.teacher_only_slots, options.dtype
    )
    work = Work(job, engines.group.actors, teachers, resources.stall_seconds)
    ray.get(processes.channel.give.remote(work))
    end = _follow(processes, on_metrics)
    for actor in (processes.channel, *teachers):
        ray.kill(actor)
    if processes.failures:
        raise processes.failures[0]
    engines.version = int(end["version"])
    engines.group.updated(end["verified"])
    return end


def _follow(processes: TrainingProcesses, on_metrics: OnMetrics) -> dict[str, Any]:
    """Pass on what the workers tell until they are done; returns the last record."""
    end: dict[str, Any] = {}
    name, alive, pid = processes.name, True, 0
    kind: WaitKind = "start"

    def describe() -> list[str]:  # Ray Train waits for workers and says nothing
        free = ray.available_resources()
        free = {name: free.get(name, 0.0) for name in processes.needs}
        return [f"each worker wants {processes.needs}, free are {free}", *log_tail(pid)[1]]

    while alive:
        WAITS.set_target(name, "the learner", what="its next step", kind=kind, log_tail=describe)
        processes.thread.join(POLL_S)
        alive = processes.thread.is_alive()
        for record in ray.get(processes.channel.drain.remote()):
            WAITS.set_target(name, None)
            # Ray Train keeps only the metrics of checkpoints, so the end comes this way too.
            if "end" in record:
                end = record["end"]
            elif "pid" in record:  # a new group of workers
                pid, kind = record["pid"], "start"
            elif "ready" in record:
                kind = "train"
            else:
                on_metrics(record)
    WAITS.set_target(name, None)
    return end
