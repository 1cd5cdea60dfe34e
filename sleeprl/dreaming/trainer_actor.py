"""The trainer actor of dreaming: takes references, does one optimiser step, sends weights."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch.distributed as dist
from ray.exceptions import ObjectLostError
from safetensors.torch import load_file

from sleeprl.algorithms.base import Algorithm
from sleeprl.cluster.actor_group import ActorGroup
from sleeprl.cluster.remote_actor import RemoteActor
from sleeprl.cluster.waits import WAITS, Watchdog
from sleeprl.config.schema import DreamingConfig
from sleeprl.data.lake import TRAJECTORIES, Lake
from sleeprl.data.trajectory import (
    TRAJECTORY_SCHEMA,
    conform,
    count_stale_tokens,
    from_batch,
    with_column,
)
from sleeprl.dreaming.checkpoint import write_group
from sleeprl.dreaming.lessons import DREAM, LessonBuilder
from sleeprl.dreaming.messages import PublishResult, StepResult
from sleeprl.dreaming.metrics import (
    describe_unscored,
    pop_agreement,
    reward_metrics,
    staleness_metrics,
    task_outcomes,
)
from sleeprl.dreaming.types import algorithm_of
from sleeprl.losses.off_policy import ImportanceWeight
from sleeprl.losses.types import LossOptions
from sleeprl.memory.checkpoint import EXPERT
from sleeprl.rollout.engine_pool import LIVENESS_TIMEOUT_S, EnginePool
from sleeprl.text.chat import ChatFormatter
from sleeprl.trainer.batching import TrainingExample
from sleeprl.trainer.checkpoint import TrainerCheckpoint
from sleeprl.trainer.options import TrainerOptions
from sleeprl.trainer.publish import publish_weights, save_trained
from sleeprl.trainer.trainer import Trainer
from sleeprl.utils.files import atomic_directory


@dataclass(frozen=True)
class DreamTrainerJob:
    """The job of the trainer, the same for every rank."""

    trainer: TrainerOptions
    """Options of the trainer."""
    config: DreamingConfig
    expert: str
    """Directory of the consolidated expert."""
    lake: str
    """Directory of the lake, with the replay texts; the dreams are appended to it."""
    seed: int
    beta: float
    """Interpolation of the divergence from the smaller self."""
    top_k: int
    """Number of tokens whose probabilities that divergence compares."""
    canary: list[int]
    """Token ids that trainer and engines both score after each update of the engines."""
    first_version: int
    """Policy version of the engines before the first update."""
    stall_seconds: float
    """A longer wait is reported."""

    def loss_options(self, algorithm: Algorithm) -> LossOptions:
        """Build the options of the loss for an algorithm."""
        config, weight = self.config, self.config.importance_weight
        return LossOptions(
            beta=self.beta,
            top_k=self.top_k,
            algorithm=algorithm,
            max_response_tokens=config.max_tokens,
            importance_weight=ImportanceWeight(weight.level, weight.mode, weight.low, weight.high),
            reference_kl=config.reference_kl,
            reference_estimator=config.reference_estimator,
        )


class DreamTrainer(RemoteActor):
    """One rank of the trainer. ``start`` on every rank takes the address that rank 0's
    ``rendezvous`` returns."""

    def __init__(self, job: DreamTrainerJob, rank: int, world: int) -> None:
        """Create the rank; ``start`` loads the model.

        Args:
            job: The trainer's job.
            rank: Number of this rank.
            world: Number of ranks.
        """
        self.job, self.rank, self.world = job, rank, world
        self.pool = EnginePool(ActorGroup("engine", []))
        self.algorithm = algorithm_of(job.config)
        self.loss = job.loss_options(self.algorithm)
        texts = Lake(job.lake).read(TRAJECTORIES)
        self.lessons = LessonBuilder(
            job.config,
            self.algorithm,
            ChatFormatter(job.trainer.checkpoint),
            from_batch(texts.filter(pc.field("purpose") == "replay")),
            job.seed,
        )
        self.table = TRAJECTORY_SCHEMA.empty_table()
        """The dreams of the last update, for the lake."""
        self._trainer: Trainer | None = None

    @property
    def trainer(self) -> Trainer:
        """The trainer, once ``start`` has joined the other ranks."""
        assert self._trainer is not None, "start has not been called"
        return self._trainer

    def rendezvous(self) -> str:
        """Return an address at which the other ranks can connect to this one."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def start(self, address: str, state: str | None = None) -> None:
        """Connect to the other ranks, and load the model.

        Args:
            address: Return value of ``rendezvous`` on rank 0.
            state: Directory of a ``save`` to continue from.
        """
        WAITS.waiter = f"learner-{self.rank}"
        os.environ.update(RANK=str(self.rank), WORLD_SIZE=str(self.world), LOCAL_RANK="0")
        dist.init_process_group(
            "nccl" if self.job.trainer.gpu else "gloo",
            init_method=address,
            rank=self.rank,
            world_size=self.world,
            timeout=timedelta(minutes=10),
        )
        critic = self.algorithm.needs_critic
        self._trainer = Trainer(replace(self.job.trainer, critic=critic))
        self._trainer.set_expert(load_file(Path(self.job.expert) / EXPERT))
        if state is not None:
            TrainerCheckpoint(Path(state)).restore(self._trainer)

    def publish(self, engines: Sequence[Any]) -> PublishResult | None:
        """Send the current weights to engines. Collective over the ranks.

        It can be repeated: a version is the number of steps, not of publications.

        Args:
            engines: Actors of the engines; None in the place of a removed one.

        Returns:
            The verified engines and the expert on rank 0; None on the other ranks.
        """
        if list(engines) != self.pool.group.actors:
            self.pool.disconnect()
            self.pool = EnginePool(ActorGroup("engine", engines, silence=LIVENESS_TIMEOUT_S))
        version = self.job.first_version + self.trainer.steps
        # Collective, so it comes first: the rest may fail on rank 0 alone.
        expert = self.trainer.gather_expert()
        with Watchdog(WAITS, self.job.stall_seconds):
            metrics = publish_weights(self.trainer, self.pool, self.job.canary, version)
        if self.rank != 0:
            return None
        unverified = int(metrics.pop("stale_engines"))
        verified = self.pool.health.working
        return PublishResult(self.pool.version, metrics, verified, unverified, ray.put(expert))

    def step(self, batches: Sequence[Any], redrawn: Sequence[Any] = ()) -> StepResult:
        """Do one update on complete groups of dreams.

        Args:
            batches: References to the groups to learn from.
            redrawn: References to groups that were set aside; they are not learned from, but appear
                in the lake, the metrics and the outcomes.
        """
        began = time.monotonic()
        learned, aside = _fetch_groups(batches), _fetch_groups(redrawn)
        dreams = from_batch(learned)
        version = self.job.first_version + self.trainer.steps
        oldest = version - self.job.config.max_staleness
        stale = [count_stale_tokens(d.versions, oldest) for d in dreams]
        rows = self.lessons.policy_rows(dreams, stale, version, self.trainer.values)
        others = self.lessons.auxiliary_rows(dreams, self.trainer.steps)
        metrics: dict[str, Any] = self.trainer.step(
            [*filter(None, rows), *others], self.lessons.parts, self.loss
        )
        learned = with_column(learned, "advantage", [_mean_advantage(row) for row in rows])
        aside = with_column(aside, "purpose", ["redrawn"] * aside.num_rows)
        self.table = pa.concat_tables([learned, aside])
        written = from_batch(self.table)
        metrics |= reward_metrics(written)
        metrics |= staleness_metrics(dreams, stale, version) | pop_agreement(metrics, DREAM)
        metrics["step_seconds"] = time.monotonic() - began
        return StepResult(metrics, task_outcomes(written), describe_unscored(written))

    def save(self, directory: str, groups: Mapping[str, Any], stale: Sequence[Any] = ()) -> None:
        """Write the trainer's state, and append the dreams of the last update to the lake.

        Args:
            directory: New directory for the state.
            groups: References to the groups in flight, by ``NUMBER-STAGE``; they are written beside
                it.
            stale: References to dreams that were regenerated; they only go into the lake.
        """
        state = self.trainer.state_dict()
        if self.rank == 0:
            with atomic_directory(directory, overwrite=True) as target:
                TrainerCheckpoint(target).save_state(state)
                for name, ref in groups.items():
                    for batch in _fetch_available([ref]):  # a lost one is generated again
                        write_group(target, name, batch)
            tables = [pa.Table.from_batches([batch]) for batch in _fetch_available(stale)]
            Lake(self.job.lake).append(pa.concat_tables([self.table, *tables]), TRAJECTORIES)
        dist.barrier()  # afterwards every rank can see the directory
        TrainerCheckpoint(Path(directory)).save_teacher_cache(self.trainer)

    def finish(self, output: str) -> int:
        """Write the expert to a directory.

        Returns:
            The policy version of the engines.
        """
        save_trained(self.trainer, Path(output), self.job.canary)
        return self.pool.version


def _fetch_available(refs: Sequence[Any]) -> Iterator[pa.RecordBatch]:
    """Fetch batches, skipping those that were lost with their owner."""
    for ref in refs:
        with suppress(ObjectLostError):
            yield ray.get(ref)


def _fetch_groups(refs: Sequence[Any]) -> pa.Table:
    """Fetch groups of dreams as one table, converting those of an earlier schema."""
    schema = TRAJECTORY_SCHEMA
    return pa.Table.from_batches([conform(b, schema) for b in ray.get(list(refs))], schema)


def _mean_advantage(row: TrainingExample | None) -> float | None:
    """Return the mean advantage of a dream, or None."""
    advantage = None if row is None else row.advantage
    return fmean(advantage) if isinstance(advantage, list) else advantage
