"""Consolidation, and the baselines beside it, as Ray Train jobs."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from sleeprl.actors.fleet import Fleet
from sleeprl.actors.mailbox import Mailbox
from sleeprl.config import ResourcesConfig
from sleeprl.consolidation.worker import Job, feed, train_loop

OnMetrics = Callable[[dict[str, Any]], None]


def budgeted(job: Job, tokens: int) -> Job:
    """The same job for as many trained tokens: it gets the steps that its method needs for them,
    and stops at the budget where its texts turn out longer."""
    steps = max(1, math.ceil(tokens / feed(job).tokens_per_step()))
    warmup = min(job.learner.warmup, steps // 4)
    return replace(
        job, tokens=tokens, learner=replace(job.learner, total_steps=steps, warmup=warmup)
    )


def run(
    job: Job,
    fleet: Fleet,
    resources: ResourcesConfig,
    storage: Path,
    name: str,
    on_metrics: OnMetrics,
) -> dict[str, Any]:
    """Run to the end and return what came of it (step, tokens, version).

    Called again with the same ``storage`` and ``name`` after a crash, the job goes on
    from its last checkpoint. on_metrics: called with each step's record, in order.
    """
    mailbox = ray.remote(Mailbox).options(num_cpus=0).remote()
    workers: dict[str, float] = {"CPU": resources.learner_cpus}
    if resources.learner_gpus:
        workers["GPU"] = resources.learner_gpus
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"job": job, "engines": fleet.group.actors, "mailbox": mailbox},
        scaling_config=ScalingConfig(
            num_workers=resources.learner_workers,
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
    while alive:
        thread.join(0.2)
        alive = thread.is_alive()
        for record in ray.get(mailbox.take.remote()):
            # Ray Train keeps only the metrics of checkpoints, so the end comes this way too.
            if "end" in record:
                end = record["end"]
            else:
                on_metrics(record)
    ray.kill(mailbox)
    if failed:
        raise failed[0]
    fleet.version = int(end["version"])
    return end
