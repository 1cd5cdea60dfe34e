"""Ray Train jobs of consolidation and of its baselines.

``TrainingProcesses`` can start before their work is known; they import their dependencies and wait.
If no other component needs their resources, they stay alive for the next job.
"""

from __future__ import annotations

import gc
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sleeprl.cluster.failures import log_tail
from sleeprl.cluster.runtime import LEARNER_RESOURCE
from sleeprl.cluster.waits import WAITS, WaitKind, Watchdog
from sleeprl.cluster.warm import processes_may_wait
from sleeprl.config.schema import ResourcesConfig
from sleeprl.consolidation.job_channel import JobChannel, Work
from sleeprl.consolidation.messages import (
    EarlierSteps,
    JobEnd,
    Report,
    StepReport,
    TrainerReady,
    WorkersStarted,
)
from sleeprl.consolidation.train_loop import Job, TrainWorker, load_data_mix
from sleeprl.rollout.engine_pool import EnginePool
from sleeprl.trainer.options import TrainerOptions
from sleeprl.trainer.setup import warm_up
from sleeprl.trainer.teacher import launch_teachers

OnStep = Callable[[StepReport], None]
POLL_S = 0.2
"""Seconds between two polls for new work or new reports."""
CHECKPOINTS = 2
"""Number of checkpoints on disk: the last one, and its predecessor while the last is being written."""
CLOSE_TIMEOUT_S = 10.0
"""Seconds to wait for the workers to exit."""


def limit_to_budget(job: Job, tokens: int) -> Job:
    """Limit a job to a budget of trained tokens.

    The number of steps is an estimate from the job's data. If the texts turn out longer, the job
    stops at the budget.

    Args:
        job: The job.
        tokens: Budget of trained tokens.

    Returns:
        A copy of the job with its budget, steps and warm-up set.
    """
    steps = max(1, math.ceil(tokens / load_data_mix(job).tokens_per_step()))
    warmup = min(job.learner.warmup, steps // 4)
    return replace(
        job, tokens=tokens, learner=replace(job.learner, total_steps=steps, warmup=warmup)
    )


class RayTrainBackend:
    """The ``TrainLoopBackend`` of a Ray Train worker."""

    def __init__(self, channel: Any) -> None:
        """Create the backend inside a worker.

        Args:
            channel: Handle of the ``JobChannel`` that receives rank 0's reports.
        """
        self.channel = channel
        self.rank = ray.train.get_context().get_world_rank()
        self.resumes = True
        """Whether a checkpoint can belong to the current job. False once the process has finished
        an earlier job."""

    @contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        """Yield the directory of the last checkpoint, or None if there is none."""
        checkpoint = ray.train.get_checkpoint() if self.resumes else None
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as directory:
            yield Path(directory)

    def save_checkpoint(self, step: int, directory: Path) -> None:
        """Upload the directories of all ranks as one Ray Train checkpoint."""
        checkpoint = ray.train.Checkpoint.from_directory(directory)
        ray.train.report({"step": step}, checkpoint=checkpoint)

    def report(self, report: Report) -> None:
        """Send a report to the driver, from rank 0 only."""
        ended = isinstance(report, JobEnd)
        if self.rank == 0:
            sent = self.channel.put.remote(report)
            if ended:
                ray.get(sent)
        if ended:
            ray.train.report(asdict(report))


def _train_loop(arguments: dict[str, Any]) -> None:
    """Run jobs until there is no more work: the entry point of a Ray Train worker.

    Args:
        arguments: ``channel``, and ``options`` of the first trainer.
    """
    channel, done = arguments["channel"], 0
    backend = RayTrainBackend(channel)
    backend.report(WorkersStarted(os.getpid()))
    WAITS.waiter = f"learner-{backend.rank}"
    found: tuple[int, Work] | None = ray.get(channel.next_work.remote(done))
    if found is None:
        warm_up(arguments["options"])
    while True:
        while found is None:
            time.sleep(POLL_S)
            found = ray.get(channel.next_work.remote(done))
        done, work = found
        if work.job is None:
            return
        _train(work, backend)
        gc.collect()  # before the next model is loaded
        found, backend.resumes = None, False


def _train(work: Work, backend: RayTrainBackend) -> None:
    """Run one job."""
    assert work.job is not None
    with Watchdog(WAITS, work.stall_seconds):
        worker = TrainWorker(work.job, work.engines, backend, work.teachers)
        backend.report(TrainerReady())
        worker.run()


class TrainingProcesses:
    """The Ray Train processes, which run one job after another.

    They can start before their work is known. After a crash, starting them with the same
    ``storage`` and ``name`` resumes the job from its last checkpoint.
    """

    def __init__(
        self, options: TrainerOptions, resources: ResourcesConfig, storage: Path, name: str
    ) -> None:
        """Start the processes in the background.

        Args:
            options: Options of the trainer, which determine what the processes import.
            resources: Number of processes, and the resources of each.
            storage: Directory of all jobs' checkpoints.
            name: Name of the job's directory in ``storage``.
        """
        # On the driver's node, since any other node can disappear.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.name, self.resources = name, resources
        self.pid = self.starts = 0
        """Process id of the current rank 0, and number of starts of the group."""
        self._idle = True
        """Whether no job is running."""
        self.channel = ray.remote(JobChannel).options(num_cpus=0, scheduling_strategy=here).remote()
        self.failures: list[BaseException] = []
        self.needs: dict[str, float] = {"CPU": resources.learner_cpus}
        if resources.learner_gpus:
            self.needs["GPU"] = resources.learner_gpus
        count: int | tuple[int, int] = resources.learner_workers
        if resources.elastic:
            # Ray Train (2.60) counts the engines' resources as free. Engines use none of this one.
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
                checkpoint_config=CheckpointConfig(num_to_keep=CHECKPOINTS),
            ),
        )
        self.thread = threading.Thread(target=self._fit, name=f"train-{name}", daemon=True)
        self.thread.start()

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:
            self.failures.append(error)

    @property
    def reusable(self) -> bool:
        """Whether the processes can run another job.

        Each job is allowed ``max_failures`` restarts, so processes that were restarted are not
        reused.
        """
        may_wait = processes_may_wait(self.resources)
        return may_wait and self.starts <= 1 and self.thread.is_alive()

    def run(
        self,
        job: Job,
        engines: EnginePool,
        on_step: OnStep,
        recorded: Collection[int] | None = None,
    ) -> JobEnd:
        """Run a job to its end.

        Args:
            job: The job to train.
            engines: Engines that receive the weights and generate the rollouts.
            on_step: Called with the report of each step, in order.
            recorded: Steps that an earlier attempt has passed to ``on_step``. Steps before the
                checkpoint that are not among them are passed first; None leaves them out.

        Returns:
            The report of the job's end.

        Raises:
            Exception: The error of Ray Train if the job has failed permanently.
        """
        resources, options = self.resources, job.learner
        teachers = launch_teachers(
            resources, options.checkpoint, options.teacher_only_slots, options.dtype
        )
        work = Work(job, engines.group.actors, teachers, resources.stall_seconds)
        self._idle = False
        ray.get(self.channel.give.remote(work))
        try:
            end = self._follow(on_step, recorded)
            if end is None:
                raise self.failures[0]
            ray.get(self.channel.clear.remote())
            self._idle = True
        finally:
            for teacher in teachers:
                ray.kill(teacher)
        engines.record_update(end.version, end.verified)
        return end

    def _follow(self, on_step: OnStep, recorded: Collection[int] | None) -> JobEnd | None:
        """Forward the reported steps; return the end of the job, or None if the job has failed."""
        known = set(recorded or ())
        kind: WaitKind = "start"
        alive = True
        while alive:
            WAITS.set_target(
                self.name, "the learner", what="its next step", kind=kind, log_tail=self._describe
            )
            self.thread.join(POLL_S)
            alive = self.thread.is_alive()
            for report in ray.get(self.channel.drain.remote()):
                WAITS.set_target(self.name, None)
                # Ray Train records only the metrics of checkpoints, so the end is reported here too.
                match report:
                    case JobEnd():
                        return report
                    case WorkersStarted(pid):
                        self.pid, self.starts, kind = pid, self.starts + 1, "start"
                    case TrainerReady():
                        kind = "train"
                    case StepReport():
                        known.add(report.step)
                        on_step(report)
                    case EarlierSteps(reports) if recorded is not None:
                        for missed in [each for each in reports if each.step not in known]:
                            known.add(missed.step)
                            on_step(missed)
        WAITS.set_target(self.name, None)
        return None

    def _describe(self) -> list[str]:
        """Describe the workers' resources and log, because Ray Train waits for resources silently."""
        free = ray.available_resources()
        free = {name: free.get(name, 0.0) for name in self.needs}
        return [f"each worker wants {self.needs}, free are {free}", *log_tail(self.pid)[1]]

    def close(self) -> None:
        """Stop the processes. If a job is running, do not wait for them to exit."""
        if self._idle and self.thread.is_alive():
            ray.get(self.channel.give.remote(Work()))
            self.thread.join(CLOSE_TIMEOUT_S)
        ray.kill(self.channel)
