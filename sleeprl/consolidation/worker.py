"""The loop of one consolidation worker: plain steps, roll-outs from the engines in between.

Runs inside a Ray Train worker. Every rank calls everything that is collective in
the same order; only rank 0 speaks to the engines.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from sleeprl.actors.fleet import Fleet, Pending
from sleeprl.actors.group import ActorGroup
from sleeprl.actors.learner import Learner, LearnerOptions, Row
from sleeprl.actors.publish import publish, save_expert
from sleeprl.chat import Chat
from sleeprl.config import ConsolidationConfig, FixedCapacityConfig
from sleeprl.consolidation import imitation
from sleeprl.consolidation.feed import Feed, trained_tokens
from sleeprl.consolidation.methods import METHODS, STUDENT
from sleeprl.losses.policy import Correction
from sleeprl.losses.streams import LossOptions
from sleeprl.trajectories.lake import Lake
from sleeprl.trajectories.schema import from_batch

STATE, POSITION = "learner.safetensors", "position.json"


@dataclass(frozen=True)
class Job:
    """One training job, plain enough to travel to the workers.

    method: a name in ``METHODS``. lake: where the self-study texts are. passages: token
        ids of the documents. output: where the trained expert goes; empty for a baseline,
        of which only the measurement stays. first_version: weight version of the first
        publication. tokens: stop when so many were trained on; 0 is no budget.
    """

    method: str
    learner: LearnerOptions
    config: ConsolidationConfig
    fixed: FixedCapacityConfig
    seed: int
    lake: str
    output: str
    canary: list[int]
    first_version: int
    passages: list[list[int]] = field(default_factory=list)
    tokens: int = 0


def feed(job: Job) -> Feed:
    """What the job learns from; rows that its method does not read are left out."""
    method = METHODS[job.method]
    texts = from_batch(Lake(job.lake).read("trajectories"))
    return Feed(method, texts, job.passages, method.objective(job.config), job.seed)


def train_loop(arguments: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker. arguments: ``job``, ``engines``, ``mailbox``."""
    job: Job = arguments["job"]
    worker = _Worker(job, arguments["engines"], arguments["mailbox"])
    for step in range(worker.learner.steps, job.learner.total_steps):
        if job.tokens and worker.tokens >= job.tokens:
            break
        worker.exchange(step)
        rows = worker.rows(step)
        mine = rows[worker.rank :: worker.world]
        metrics = worker.learner.step(mine, worker.feed.parts, worker.loss)
        worker.report(step, rows, metrics)
    worker.finish()


class _Worker:
    def __init__(self, job: Job, engines: list[Any], mailbox: Any) -> None:
        self.job, self.mailbox = job, mailbox
        self.learner = Learner(job.learner)
        self.rank, self.world = self.learner.rank, self.learner.world
        self.fleet = Fleet(ActorGroup("engine", engines))
        self.fleet.version = job.first_version - 1
        method = METHODS[job.method]
        self.config = method.objective(job.config)
        self.loss = LossOptions(
            beta=self.config.beta, top_k=self.config.top_k, correction=Correction()
        )
        self.feed = feed(job)
        self.on_policy = STUDENT in self.feed.parts
        if method.anchored:
            own = random.Random(f"{job.seed}-fisher").sample(self.feed.own, len(self.feed.own))
            self.learner.anchor(own[: job.fixed.fisher_texts], job.fixed.ewc)
        self.chat = Chat(job.learner.checkpoint)
        self.pending: tuple[list[imitation.Continuation], Pending] | None = None
        self.student_rows: list[Row] = []
        self.extra: dict[str, float] = {}
        self.tokens = 0
        self._restore()

    # --- roll-outs ----------------------------------------------------------------

    def exchange(self, step: int) -> None:
        """Every ``rollout_every`` steps: take the roll-outs that the engines wrote meanwhile,
        send them the present weights, and ask for the next ones. Generation overlaps learning,
        unless roll-outs are all there is to learn from."""
        config = self.config
        if not self.on_policy or step % config.rollout_every:
            return
        self._collect()
        if step and step % config.checkpoint_every == 0:
            self._checkpoint(step)
        self.extra.update(publish(self.learner, self.fleet, self.job.canary))
        if self.rank == 0:
            rng = random.Random(f"{self.job.seed}-rollouts-{step}")
            old = round(config.rollout_prompts * self.feed.replay_share)
            drawn = imitation.draw(self.feed.new, config.rollout_prompts - old, config, rng)
            drawn += imitation.draw(self.feed.replay, old, config, rng) if old else []
            prompts, sampling = imitation.requests(drawn, config, rng)
            self.pending = (drawn, self.fleet.generate_later(prompts, sampling))
        if not self.feed.streams:
            self._collect()

    def _collect(self) -> None:
        """Take what was asked for; where nothing was, what a checkpoint brought stays."""
        shared: list[list[Row] | None] = [None]
        if self.pending is not None:
            drawn, pending = self.pending
            rows, told = imitation.rows(drawn, pending.wait(), self.config, self.chat)
            random.Random(self.learner.steps).shuffle(rows)
            self.extra.update(told)
            self.pending = None
            shared = [rows]
        if self.world > 1:
            dist.broadcast_object_list(shared, src=0)
        if shared[0] is not None:
            self.student_rows = shared[0]

    def rows(self, step: int) -> list[Row]:
        """What is learnt from in ``step``, over all ranks."""
        every = self.config.rollout_every
        return self.feed.rows(step) + self.student_rows[step % every :: every]

    # --- state --------------------------------------------------------------------

    def report(self, step: int, rows: list[Row], metrics: dict[str, float]) -> None:
        self.tokens += trained_tokens(rows)
        if self.rank == 0:
            record = {**metrics, **self.extra, "trained_tokens": self.tokens}
            self.mailbox.put.remote({"step": step + 1, **record})
        self.extra = {}

    def _checkpoint(self, step: int) -> None:
        state = self.learner.state()
        with _scratch() as directory:
            checkpoint = None
            if self.rank == 0:
                save_file(state, directory / STATE)
                position = {
                    "tokens": self.tokens,
                    "version": self.fleet.version,
                    "student_rows": [asdict(r) for r in self.student_rows],
                }
                (directory / POSITION).write_text(json.dumps(position))
                checkpoint = ray.train.Checkpoint.from_directory(directory)
            ray.train.report({"step": step}, checkpoint=checkpoint)

    def _restore(self) -> None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as directory:
            self.learner.load_state(load_file(Path(directory) / STATE))
            position = json.loads((Path(directory) / POSITION).read_text())
        self.tokens = position["tokens"]
        self.fleet.version = max(self.fleet.version, position["version"])
        self.student_rows = [Row(**r) for r in position["student_rows"]]

    def finish(self) -> None:
        """Leave the final weights in the engines and, where it is wanted, the expert on disk."""
        if self.pending is not None:
            self.pending[1].wait()
        publish(self.learner, self.fleet, self.job.canary)
        if self.job.output:
            save_expert(self.learner, Path(self.job.output), self.job.canary)
        end = {"step": self.learner.steps, "tokens": self.tokens, "version": self.fleet.version}
        if self.rank == 0:
            ray.get(self.mailbox.put.remote({"end": end}))
        ray.train.report(end)


@contextmanager
def _scratch() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="sleeprl-checkpoint-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
