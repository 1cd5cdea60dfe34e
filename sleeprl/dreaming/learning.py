"""The learner actor of dreaming: references in, one optimiser step, weights out."""

from __future__ import annotations

import json
import os
import random
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch.distributed as dist
from safetensors.torch import load_file

from sleeprl.actors.fleet import Fleet
from sleeprl.actors.group import ActorGroup, Served
from sleeprl.actors.learner import Learner, LearnerOptions, Row
from sleeprl.actors.publish import publish, save_expert
from sleeprl.chat import Chat
from sleeprl.config import DreamingConfig
from sleeprl.dreaming.tasks import Outcome
from sleeprl.losses.policy import Correction, group_advantages
from sleeprl.losses.streams import LossOptions, Part
from sleeprl.memory.checkpoint import EXPERT
from sleeprl.prompts import parse_qa
from sleeprl.trajectories.lake import Lake
from sleeprl.trajectories.schema import Trajectory, from_batch

DREAM, LEARN, HOLD = "dream", "learn", "hold"


@dataclass(frozen=True)
class LearnerJob:
    """expert: directory of the consolidated expert. lake: where the replay texts are."""

    learner: LearnerOptions
    config: DreamingConfig
    expert: str
    lake: str
    seed: int
    beta: float
    top_k: int
    canary: list[int]
    first_version: int


class LearnerActor(Served):
    """One rank. ``rendezvous`` on rank 0 gives the address that every rank's ``start`` takes."""

    def __init__(self, job: LearnerJob, rank: int, world: int, engines: Sequence[Any]) -> None:
        self.job, self.rank, self.world = job, rank, world
        self.engines = list(engines)

    def rendezvous(self) -> str:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def start(self, address: str) -> None:
        os.environ.update(RANK=str(self.rank), WORLD_SIZE=str(self.world), LOCAL_RANK="0")
        dist.init_process_group(
            "nccl" if self.job.learner.gpu else "gloo",
            init_method=address,
            rank=self.rank,
            world_size=self.world,
            timeout=timedelta(minutes=10),
        )
        config = self.job.config
        self.learner = Learner(self.job.learner)
        self.learner.set_expert(load_file(Path(self.job.expert) / EXPERT))
        self.fleet = Fleet(ActorGroup("engine", self.engines))
        self.fleet.version = self.job.first_version - 1
        self.chat = Chat(self.job.learner.checkpoint)
        texts = from_batch(Lake(self.job.lake).read("trajectories"))
        self.replay = [t for t in texts if t.purpose == "replay"]
        self.parts = {
            DREAM: Part(pg=config.policy),
            LEARN: Part(ce=config.learn),
            HOLD: Part(kl=config.hold),
        }
        self.loss = LossOptions(
            beta=self.job.beta,
            top_k=self.job.top_k,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            correction=Correction(
                config.correction_level,
                config.correction_mode,
                config.correction_low,
                config.correction_high,
            ),
        )

    def publish(self) -> dict[str, Any]:
        """Send the present weights; on rank 0 with the expert by reference, for the scorers."""
        metrics: dict[str, Any] = publish(self.learner, self.fleet, self.job.canary)
        expert = self.learner.expert()
        if self.rank == 0:
            metrics |= {"version": self.fleet.version, "expert": ray.put(expert)}
        return metrics

    def step(self, batches: Sequence[Any]) -> dict[str, Any]:
        """One update on whole groups of dreams, by reference.

        Returns ``metrics`` and ``outcomes``. Rank 0 appends the dreams to the lake.
        """
        began = time.monotonic()
        table = pa.Table.from_batches(ray.get(list(batches)))
        dreams = from_batch(table)
        advantages = group_advantages([d.reward for d in dreams], [_group(d) for d in dreams])
        rows = self._rows(dreams, advantages)
        metrics = self.learner.step(rows[self.rank :: self.world], self.parts, self.loss)
        metrics |= _describe(dreams, self.learner.steps - 1 + self.job.first_version)
        if self.rank == 0:
            Lake(self.job.lake).append(table, "trajectories")
        metrics["step_seconds"] = time.monotonic() - began
        return {"metrics": metrics, "outcomes": outcomes(dreams)}

    def _rows(self, dreams: Sequence[Trajectory], advantages: Sequence[float | None]) -> list[Row]:
        rows = [
            Row(d.prompt_ids, d.response_ids, DREAM, None, advantage, d.logprobs)
            for d, advantage in zip(dreams, advantages, strict=True)
            if advantage is not None and d.response_ids
        ]
        for dream in dreams:
            pair = parse_qa(self.chat.decode(dream.response_ids))
            if pair and dream.reward is not None and dream.reward > 0:
                rows.append(Row(self.chat.prompt(pair[0]), self.chat.response(pair[1]), LEARN))
        if self.replay:
            rng = random.Random(f"{self.job.seed}-hold-{self.learner.steps}")
            rows += [
                Row(t.prompt_ids, t.response_ids, HOLD, key=t.uid)
                for t in rng.choices(self.replay, k=len(dreams))
            ]
        return rows

    def finish(self, output: str) -> dict[str, Any]:
        save_expert(self.learner, Path(output), self.job.canary)
        return {"version": self.fleet.version}


def outcomes(dreams: Sequence[Trajectory]) -> list[Outcome]:
    """What came of each task, over all its dreams in the batch."""
    made = []
    for task in dict.fromkeys(d.task_id for d in dreams):
        mine = [d for d in dreams if d.task_id == task]
        gaps = [json.loads(d.meta)["gap"] for d in mine]
        rewards = [d.reward for d in mine if d.reward is not None]
        made.append(Outcome(task, rewards, sum(gaps) / len(gaps)))
    return made


def _group(dream: Trajectory) -> str:
    """The uid without its attempt: dreams that were written together."""
    return dream.uid.rpartition("-")[0]


def _describe(dreams: Sequence[Trajectory], version: int) -> dict[str, float]:
    scored = [d.reward for d in dreams if d.reward is not None]
    ages = [version - v for d in dreams for v in d.versions]
    drift = [
        behaviour - reference
        for d in dreams
        for behaviour, reference in zip(
            d.logprobs, d.ref_logprobs or [], strict=bool(d.ref_logprobs)
        )
    ]
    return {
        "reward": sum(scored) / max(1, len(scored)),
        "reward_positive": sum(r > 0 for r in scored) / max(1, len(scored)),
        "unscored": float(len(dreams) - len(scored)),
        "gap": sum(json.loads(d.meta)["gap"] for d in dreams) / len(dreams),
        "staleness": sum(ages) / max(1, len(ages)),
        "staleness_max": float(max(ages, default=0)),
        "reference_kl": sum(drift) / max(1, len(drift)),
        "response_tokens": sum(len(d.response_ids) for d in dreams) / len(dreams),
    }
