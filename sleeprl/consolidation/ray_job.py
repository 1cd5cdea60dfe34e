"""Consolidation, and the baselines beside it, as Ray Train jobs."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
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
from sleeprl.cluster.waits import WAITS, Watchdog
from sleeprl.config.schema import ResourcesConfig
from sleeprl.consolidation.metrics_queue import MetricsQueue
from sleeprl.consolidation.train_loop import Job, feed, learn
from sleeprl.rollout.engine_pool import EnginePool
from sleeprl.trainer.teacher import launch_teachers

OnMetrics = Callable[[dict[str, Any]], None]


def limit_to_budget(job: Job, tokens: int) -> Job:
    """The same job for as many trained tokens: it gets the steps that its method needs for them,
    and stops at the budget where its texts turn out longer."""
    steps = max(1, math.ceil(tokens / feed(job).tokens_per_step()))
    warmup = min(job.learner.warmup, steps // 4)
    return replace(
        job, tokens=tokens, learner=replace(job.learner, total_steps=steps, warmup=warmup)
    )


class RayTrainBackend:
    """The shell of a Ray Train worker. mailbox: where rank 0's figures go."""

    def __init__(self, mailbox: Any) -> None:
        self.mailbox = mailbox
        self.rank = ray.train.get_context().get_world_rank()

    @contextmanager
    def kept(self) -> Iterator[Path | None]:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as directory:
            yield Path(directory)

    def keep(self, step: int, directory: Path) -> None:
        kept = ray.train.Checkpoint.from_directory(directory)
        ray.train.report({"step": step}, checkpoint=kept)

    def tell(self, record: dict[str, Any]) -> None:
        end = record.get("end")
        if self.rank == 0:
            sent = self.mailbox.put.remote(record)
            if end is not None:
                ray.get(sent)
        if end is not None:
            ray.train.report(end)


def _train_loop(arguments: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker. arguments: ``job``, ``engines``, ``teachers``, ``mailbox``."""
    shell = RayTrainBackend(arguments["mailbox"])
    shell.tell({"pid": os.getpid()})
    WAITS.waiter = f"learner-{shell.rank}"
    with Watchdog(WAITS, arguments["stall_seconds"]):
        learn(arguments["job"], arguments["engines"], shell, arguments["teachers"])


def _free(wanted: Iterable[str]) -> dict[str, float]:
    """What nobody holds of these resources in the cluster; engines hold some of it for good."""
    free = ray.available_resources()
    return {name: free.get(name, 0.0) for name in wanted}


def run(
    job: Job,
    fleet: EnginePool,
    resources: ResourcesConfig,
    storage: Path,
    name: str,
    on_metrics: OnMetrics,
) -> dict[str, Any]:
    """Run to the end and return what came of it (step, tokens, version, verified engines).

    Called again with the same ``storage`` and ``name`` after a crash, the job goes on
    from its last checkpoint. on_metrics: called with each step's record, in order.
    """
    # Where the driver is, not on a node that may be taken away.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(MetricsQueue).options(num_cpus=0, scheduling_strategy=here).remote()
    options = job.learner
    teachers = launch_teachers(
        resources, options.checkpoint, options.teacher_only_slots, options.dtype
    )
    workers: dict[str, float] = {"CPU": resources.learner_cpus}
    if resources.learner_gpus:
        workers["GPU"] = resources.learner_gpus
    count: int | tuple[int, int] = resources.learner_workers
    if resources.elastic:
        # What engines hold counts as free with Ray Train (2.60); of this resource they hold nothing.
        workers[LEARNER_RESOURCE], count = (
            1,
            (resources.learner_workers, resources.learner_workers_max),
        )
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config={
            "job": job,
            "engines": fleet.group.actors,
            "teachers": teachers,
            "mailbox": mailbox,
            "stall_seconds": resources.stall_seconds,
        },
        scaling_config=ScalingConfig(
            num_workers=count,
            use_gpu=resources.learner_gpus > 0,
            resources_per_worker=workers,
        ),
        torch_config=TorchConfig(backend="nccl" if resources.learner_gpus else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage.resolve()),
            failure_config=FailureConfig(max_failures=resources.max_failures),
        ),
    )
    failed: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=fit, name=f"train-{name}", daemon=True)
    thread.start()
    end: dict[str, Any] = {}
    alive = True

    def worker_log() -> list[str]:  # Ray Train waits for workers and says nothing
        return [f"each worker wants {workers}, free are {_free(workers)}", *log_tail(pid)[1]]

    pid = 0
    while alive:
        WAITS.now(name, "the learner", what="its next step", kind="train", log_tail=worker_log)
        thread.join(0.2)
        alive = thread.is_alive()
        for record in ray.get(mailbox.take.remote()):
            WAITS.now(name, None)
            # Ray Train keeps only the metrics of checkpoints, so the end comes this way too.
            if "end" in record:
                end = record["end"]
            elif "pid" in record:
                pid = record["pid"]
            else:
                on_metrics(record)
    WAITS.now(name, None)
    for actor in (mailbox, *teachers):
        ray.kill(actor)
    if failed:
        raise failed[0]
    fleet.version = int(end["version"])
    fleet.group.updated(end["verified"])
    return end
