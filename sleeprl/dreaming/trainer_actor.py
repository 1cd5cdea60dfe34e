"""The learner actor of dreaming: references in, one optimiser step, weights out."""

from __future__ import annotations

import json
import os
import random
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch.distributed as dist
from ray.exceptions import ObjectLostError
from safetensors.torch import load_file

from sleeprl.algorithms.base import CriticAlgorithm
from sleeprl.cluster.actor_group import ActorGroup
from sleeprl.cluster.remote_actor import RemoteActor
from sleeprl.cluster.waits import WAITS, Watchdog
from sleeprl.config.schema import DreamingConfig
from sleeprl.data.lake import TRAJECTORIES, Lake
from sleeprl.data.trajectory import (
    TRAJECTORY_SCHEMA,
    Trajectory,
    conform,
    from_batch,
    outdated,
    with_column,
)
from sleeprl.dreaming.checkpoint import write_group
from sleeprl.dreaming.messages import PublishResult, StepResult
from sleeprl.dreaming.types import Outcome, algorithm_of, scores
from sleeprl.losses.off_policy import ImportanceWeight
from sleeprl.losses.types import LossOptions, LossWeights
from sleeprl.memory.checkpoint import EXPERT
from sleeprl.rollout.engine_pool import LIVENESS_TIMEOUT_S, EnginePool
from sleeprl.text.chat import ChatFormatter
from sleeprl.text.prompts import parse_qa
from sleeprl.trainer.batching import TrainingExample
from sleeprl.trainer.checkpoint import TrainerCheckpoint
from sleeprl.trainer.options import TrainerOptions
from sleeprl.trainer.publish import publish_weights, save_trained
from sleeprl.trainer.trainer import Trainer
from sleeprl.utils.files import atomic_directory

DREAM, LEARN, HOLD = "dream", "learn", "hold"


@dataclass(frozen=True)
class DreamTrainerJob:
    """expert: directory of the consolidated expert. lake: where the replay texts are."""

    learner: TrainerOptions
    config: DreamingConfig
    expert: str
    lake: str
    seed: int
    beta: float
    top_k: int
    canary: list[int]
    first_version: int
    stall_seconds: float


class DreamTrainer(RemoteActor):
    """One rank. ``rendezvous`` on rank 0 gives the address that every rank's ``start`` takes."""

    def __init__(self, job: DreamTrainerJob, rank: int, world: int) -> None:
        self.job, self.rank, self.world = job, rank, world
        self.pool = EnginePool(ActorGroup("engine", []))

    def rendezvous(self) -> str:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def start(self, address: str, state: str | None = None) -> None:
        """Join the other ranks. state: directory of a ``save`` to go on from."""
        WAITS.waiter = f"learner-{self.rank}"
        os.environ.update(RANK=str(self.rank), WORLD_SIZE=str(self.world), LOCAL_RANK="0")
        dist.init_process_group(
            "nccl" if self.job.learner.gpu else "gloo",
            init_method=address,
            rank=self.rank,
            world_size=self.world,
            timeout=timedelta(minutes=10),
        )
        config = self.job.config
        self.algorithm = algorithm_of(config)
        critic = self.algorithm.needs_critic
        self.learner = Trainer(replace(self.job.learner, critic=critic))
        self.learner.set_expert(load_file(Path(self.job.expert) / EXPERT))
        if state is not None:
            TrainerCheckpoint(Path(state)).restore(self.learner)
        self.chat = ChatFormatter(self.job.learner.checkpoint)
        texts = Lake(self.job.lake).read(TRAJECTORIES)
        self.replay = from_batch(texts.filter(pc.field("purpose") == "replay"))
        self.parts = {
            DREAM: LossWeights(pg=config.loss.policy_gradient),
            LEARN: LossWeights(ce=config.loss.sft),
            HOLD: LossWeights(kl=config.loss.replay_kl),
        }
        self.loss = LossOptions(
            beta=self.job.beta,
            top_k=self.job.top_k,
            algorithm=self.algorithm,
            max_response_tokens=config.max_tokens,
            importance_weight=ImportanceWeight(
                config.importance_weight.level,
                config.importance_weight.mode,
                config.importance_weight.low,
                config.importance_weight.high,
            ),
            reference_kl=config.reference_kl,
            reference_estimator=config.reference_estimator,
        )

    def publish(self, engines: Sequence[Any]) -> PublishResult | None:
        """Send the present weights to these engines, None in the place of one that was removed; on
        rank 0 with the expert by reference, for the scorers, and which engines ended the update
        verified, by their index.

        May be done again: a version is known by the number of steps, not of publications.
        """
        if list(engines) != self.pool.group.actors:
            self.pool.disconnect()
            self.pool = EnginePool(ActorGroup("engine", engines, silence=LIVENESS_TIMEOUT_S))
        version = self.job.first_version + self.learner.steps
        # Collective, so first: what follows may fail on rank 0 alone.
        expert = self.learner.gather_expert()
        with Watchdog(WAITS, self.job.stall_seconds):
            metrics: dict[str, Any] = publish_weights(
                self.learner, self.pool, self.job.canary, version
            )
        if self.rank != 0:
            return None
        unverified = int(metrics.pop("stale_engines"))
        verified = self.pool.health.working
        return PublishResult(self.pool.version, metrics, verified, unverified, ray.put(expert))

    def step(self, batches: Sequence[Any], redrawn: Sequence[Any] = ()) -> StepResult:
        """One update on whole groups of dreams, by reference. redrawn: groups that were set aside
        for some of them; they are not learned from, but are in the lake and in what is told.

        Returns ``metrics`` and ``outcomes``.
        """
        began = time.monotonic()
        learned, others = _table(batches), _table(redrawn)
        dreams = from_batch(learned)
        version = self.job.first_version + self.learner.steps
        old = [outdated(d.versions, version - self.job.config.max_staleness) for d in dreams]
        judged = self._judged(dreams, old, version)
        rows = [*filter(None, judged), *self._others(dreams)]
        metrics: dict[str, Any] = self.learner.step(rows, self.parts, self.loss)
        told = with_column(learned, "advantage", [_advantage(row) for row in judged])
        aside = with_column(others, "purpose", ["redrawn"] * others.num_rows)
        self.table = pa.concat_tables([told, aside])
        written = from_batch(self.table)
        metrics |= _describe(written)
        metrics |= _ages(dreams, old, version) | _agreement(metrics)
        metrics["step_seconds"] = time.monotonic() - began
        return StepResult(metrics, outcomes(written))

    def _judged(
        self, dreams: Sequence[Trajectory], old: Sequence[int], version: int
    ) -> list[TrainingExample | None]:
        """Each dream for the policy gradient on its writer; None where it has no advantage. old: how
        many tokens each begins with that are too old to learn from; they count as read."""
        advantages = self.algorithm.advantages(scores(dreams, self.job.config.max_tokens))
        judged = [
            TrainingExample(
                prompt_ids=d.prompt_ids + d.response_ids[:n],
                response_ids=d.response_ids[n:],
                part=DREAM,
                advantage=advantage,
                rollout_logprobs=d.logprobs[n:],
                age=version - min(d.versions),
                reference_logprobs=(d.ref_logprobs or [])[n:],
            )
            if advantage is not None and d.response_ids[n:]
            else None
            for d, advantage, n in zip(dreams, advantages, old, strict=True)
        ]
        if not self.algorithm.needs_critic:
            return judged
        algorithm = cast(CriticAlgorithm, self.algorithm)
        rows = [row for row in judged if row is not None]
        values = self.learner.values(rows)
        rewards = [row.advantage for row in rows if not isinstance(row.advantage, list)]
        found = zip(rows, values, *algorithm.estimate_advantages(rewards, values), strict=True)
        estimated = iter(
            [
                replace(row, advantage=advantage, values=expected, returns=returns)
                for row, expected, advantage, returns in found
            ]
        )
        return [row and next(estimated) for row in judged]

    def _others(self, dreams: Sequence[Trajectory]) -> list[TrainingExample]:
        """The pairs of dreams that taught something, and the smaller self's own texts."""
        rows = []
        for dream in dreams:
            pair = parse_qa(self.chat.decode(dream.response_ids))
            if pair and dream.reward is not None and dream.reward > 0:
                rows.append(
                    TrainingExample(self.chat.prompt(pair[0]), self.chat.response(pair[1]), LEARN)
                )
        if self.replay:
            rng = random.Random(f"{self.job.seed}-hold-{self.learner.steps}")
            rows += [
                TrainingExample(t.prompt_ids, t.response_ids, HOLD, key=t.uid)
                for t in rng.choices(self.replay, k=len(dreams))
            ]
        return rows

    def save(self, directory: str, groups: Mapping[str, Any], outdated: Sequence[Any] = ()) -> None:
        """Keep the learner's state in a new directory, and the last step's dreams in the lake.

        groups: references of those under way, by ``NUMBER-STAGE``, to be kept beside it. outdated:
        of dreams that were written anew, for the lake alone.
        """
        state = self.learner.state_dict()
        if self.rank == 0:
            with atomic_directory(directory, overwrite=True) as target:
                TrainerCheckpoint(target).save_state(state)
                for name, ref in groups.items():
                    for batch in _there([ref]):  # if not, it will be written again
                        write_group(target, name, batch)
            told = [self.table, *map(pa.Table.from_batches, ([b] for b in _there(outdated)))]
            Lake(self.job.lake).append(pa.concat_tables(told), TRAJECTORIES)
        dist.barrier()  # the directory is there
        TrainerCheckpoint(Path(directory)).save_teacher_cache(self.learner)

    def finish(self, output: str) -> int:
        save_trained(self.learner, Path(output), self.job.canary)
        return self.pool.version


def _there(batches: Sequence[Any]) -> Iterator[pa.RecordBatch]:
    """By reference; but those that were lost with who wrote them."""
    for ref in batches:
        with suppress(ObjectLostError):
            yield ray.get(ref)


def _table(batches: Sequence[Any]) -> pa.Table:
    """Groups of dreams by reference, as one; an older sleepRL may have written some."""
    schema = TRAJECTORY_SCHEMA
    return pa.Table.from_batches([conform(b, schema) for b in ray.get(list(batches))], schema)


def _advantage(row: TrainingExample | None) -> float | None:
    """Of a whole dream."""
    found = None if row is None else row.advantage
    return fmean(found) if isinstance(found, list) else found


def outcomes(dreams: Sequence[Trajectory]) -> list[Outcome]:
    """What came of each task, over all its dreams in the batch."""
    made = []
    for task in dict.fromkeys(d.task_id for d in dreams):
        mine = [d for d in dreams if d.task_id == task]
        gaps = [json.loads(d.meta)["gap"] for d in mine]
        rewards = [d.reward for d in mine if d.reward is not None]
        made.append(Outcome(task, rewards, sum(gaps) / len(gaps)))
    return made


def _ages(dreams: Sequence[Trajectory], old: Sequence[int], version: int) -> dict[str, Any]:
    """By how many versions the tokens that are learned trail the learner's."""
    ages = [version - v for d, n in zip(dreams, old, strict=True) for v in d.versions[n:]]
    return {
        "tokens_too_old": float(sum(old)),
        "staleness": sum(ages) / max(1, len(ages)),
        "staleness_max": float(max(ages, default=0)),
        "staleness_tokens": {str(age): ages.count(age) for age in sorted(set(ages))},
    }


def _agreement(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Mean and largest difference, in nats, of the engines' log-probabilities from the learner's, by
    the age of the weights a dream was begun with; taken out of the metrics of a step.

    At age 0 and temperature 1 it is what the two sides differ by. A dream that went on after an
    update counts as old: the cache that it goes on with is.
    """
    parts = [key.split("/") for key in metrics if key.startswith(f"{DREAM}/age_")]
    ages = sorted({int(part[1].removeprefix("age_")) for part in parts})
    found: dict[str, dict[str, float]] = {"logprob_difference": {}, "logprob_difference_max": {}}
    for age in ages:
        share, apart, largest = (
            metrics.pop(f"{DREAM}/age_{age}/{what}") for what in ("share", "apart", "max")
        )
        found["logprob_difference"][str(age)] = apart / share
        found["logprob_difference_max"][str(age)] = largest
    return found


def _describe(dreams: Sequence[Trajectory]) -> dict[str, Any]:
    """What was written for an update; without what was redrawn the rewards would look better."""
    scored = [d.reward for d in dreams if d.reward is not None]
    return {
        "reward": sum(scored) / max(1, len(scored)),
        "reward_positive": sum(r > 0 for r in scored) / max(1, len(scored)),
        "unscored": float(len(dreams) - len(scored)),
        "gap": sum(json.loads(d.meta)["gap"] for d in dreams) / len(dreams),
        "response_tokens": sum(len(d.response_ids) for d in dreams) / len(dreams),
    }
