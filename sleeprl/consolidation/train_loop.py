"""The training loop of one consolidation worker: optimiser steps with rollouts in between.

Every rank calls all collective operations in the same order; only rank 0 talks to the engines. The
loop runs on a ``TrainLoopBackend``; that of a night is Ray Train (``ray_job``).
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch.distributed as dist

from sleeprl.cluster.actor_group import ActorGroup
from sleeprl.config.methods import METHODS
from sleeprl.config.schema import ConsolidationConfig, FixedCapacityConfig
from sleeprl.consolidation import student_rollouts as rollouts
from sleeprl.consolidation.backend import TrainLoopBackend
from sleeprl.consolidation.data_mix import DataMix, trained_tokens
from sleeprl.consolidation.judges import make_judge
from sleeprl.consolidation.messages import EarlierSteps, JobEnd, StepReport
from sleeprl.data.lake import TRAJECTORIES, Lake
from sleeprl.data.trajectory import Trajectory, from_batch, to_batch
from sleeprl.losses.off_policy import ImportanceWeight
from sleeprl.losses.types import LossOptions
from sleeprl.plugins import create
from sleeprl.rollout.engine_pool import LIVENESS_TIMEOUT_S, EnginePool, PendingResults
from sleeprl.rollout.types import Completion
from sleeprl.text.chat import ChatFormatter
from sleeprl.trainer.batching import TrainingExample
from sleeprl.trainer.checkpoint import TrainerCheckpoint
from sleeprl.trainer.options import TrainerOptions
from sleeprl.trainer.publish import publish_weights, save_trained
from sleeprl.trainer.teacher import Teachers
from sleeprl.trainer.trainer import Trainer
from sleeprl.utils.files import read_json

POSITION = "position.json"


@dataclass(frozen=True)
class Job:
    """One training job, serialisable for the workers."""

    method: str
    """A name in ``METHODS``."""
    learner: TrainerOptions
    config: ConsolidationConfig
    fixed: FixedCapacityConfig
    """Settings of the baselines that train every parameter."""
    seed: int
    """Seed of data order and sampling."""
    lake: str
    """Directory of the lake with the self-study texts; rollouts are appended to it."""
    output: str
    """Directory of the trained expert; empty for a baseline, of which only the metrics are used."""
    canary: list[int]
    """Token ids that trainer and engines both score after each weight update."""
    first_version: int
    """Policy version of the first published weights."""
    passages: list[list[int]] = field(default_factory=list)
    """Token ids of the documents."""
    tokens: int = 0
    """Budget of trained tokens, after which the job stops; 0 for none."""

    @property
    def name(self) -> str:
        """Name of the job, unique on its lake."""
        return Path(self.output).name or self.method


def load_data_mix(job: Job) -> DataMix:
    """Load the texts that the job's method trains on."""
    method = METHODS[job.method]
    table = Lake(job.lake).read(TRAJECTORIES)
    texts = from_batch(table.filter(pc.field("purpose").isin(["self_study", "replay"])))
    return DataMix(method, texts, job.passages, method.objective(job.config), job.seed)


def learn(
    job: Job, engines: Sequence[Any], backend: TrainLoopBackend, teachers: Sequence[Any] = ()
) -> None:
    """Run the job, from its last checkpoint if there is one. Collective.

    Args:
        job: The job to train.
        engines: Handles of the engines.
        backend: Stores checkpoints and receives reports.
        teachers: Handles of the teachers; without any, the trainer's own module teaches.
    """
    TrainWorker(job, engines, backend, teachers).run()


class TrainWorker:
    """One rank of a training job: its trainer, its data, and the pending rollouts."""

    def __init__(
        self, job: Job, engines: Sequence[Any], backend: TrainLoopBackend, teachers: Sequence[Any]
    ) -> None:
        """Load the model and the data, and restore the last checkpoint. Collective."""
        self.job, self.backend = job, backend
        self.trainer = Trainer(job.learner, Teachers(teachers) if teachers else None)
        self.rank, self.world = self.trainer.rank, self.trainer.world
        group = ActorGroup("engine", engines, silence=LIVENESS_TIMEOUT_S)
        self.engines = EnginePool(group, version=job.first_version - 1)
        self._sleep_engines()
        method = METHODS[job.method]
        self.config = config = method.objective(job.config)
        self.data = load_data_mix(job)
        self.loss = LossOptions(
            beta=config.beta,
            top_k=config.top_k,
            support=config.support,
            pointwise_clip=config.pointwise_clip,
            algorithm=create(config.algorithm, "algorithm", config.algorithm_options),
            max_response_tokens=rollouts.longest_rollout([*self.data.new, *self.data.replay]),
            importance_weight=ImportanceWeight("off"),
        )
        if method.anchored:
            texts = self.data.free_texts
            texts = random.Random(f"{job.seed}-fisher").sample(texts, len(texts))
            self.trainer.add_ewc_penalty(texts[: job.fixed.fisher_texts], job.fixed.ewc)
        self.chat = ChatFormatter(job.learner.checkpoint)
        self.judge = make_judge(config.judge, config.judge_options, self.trainer, self.chat)
        self.pending: tuple[list[rollouts.Continuation], PendingResults] | None = None
        """Rank 0 only: the rollouts that the engines are generating."""
        self.student_rows: list[TrainingExample] = []
        """The last rollouts, of all ranks."""
        self.unsaved: list[Trajectory] = []
        """Rank 0 only: rollouts since the last checkpoint, not yet in the lake."""
        self.rollout_metrics: dict[str, float] = {}
        """Metrics of rollouts, reported with the next step."""
        self.tokens = 0
        """Trained tokens so far."""
        self.reports: list[StepReport] = []
        """All steps so far: checkpoints keep them, because a report may be lost with its receiver."""
        self._restore()
        self.saved_step = self.trainer.steps

    def run(self) -> None:
        """Train to the last step, or until the token budget is used up. Collective."""
        for step in range(self.trainer.steps, self.job.learner.total_steps):
            if self.job.tokens and self.tokens >= self.job.tokens:
                break
            self.sync_rollouts(step)
            rows = self.rows(step)
            metrics = self.trainer.step(rows, self.data.parts(step), self.loss)
            self._report(step, rows, metrics)
        self.finish()

    # --- rollouts -----------------------------------------------------------------

    def sync_rollouts(self, step: int) -> None:
        """Collect rollouts, publish weights and request new rollouts, every ``rollout_every`` steps.

        Generation overlaps with training, unless rollouts are the only data, or engines and trainer
        share a device. Checkpoints are taken in between, when no rollout is pending.
        """
        config, reads_rollouts = self.config, self.data.rollouts
        if reads_rollouts and step % config.rollout_every:
            return
        if reads_rollouts:
            self._collect_rollouts()
        if step - self.saved_step >= config.checkpoint_every:
            self._save_checkpoint(step)
        if not reads_rollouts:
            return
        self.rollout_metrics.update(publish_weights(self.trainer, self.engines, self.job.canary))
        if self.rank == 0:
            rng = random.Random(f"{self.job.seed}-rollouts-{step}")
            old = round(config.rollout_prompts * self.data.replay_share)
            drawn = rollouts.draw(self.data.new, config.rollout_prompts - old, config, rng)
            drawn += rollouts.draw(self.data.replay, old, config, rng) if old else []
            prompts, sampling = rollouts.build_requests(drawn, config, rng)
            self.pending = (drawn, self.engines.generate_later(prompts, sampling))
        if not self.data.streams or self.job.learner.colocated:
            self._collect_rollouts()

    def _collect_rollouts(self) -> None:
        """Score the pending rollouts; if there are none, retain those restored from a checkpoint."""
        written: list[Any] = [None]
        if self.pending is not None:
            drawn, pending = self.pending
            written, self.pending = [(drawn, pending.wait())], None
            self._sleep_engines()
        if self.world > 1:
            dist.broadcast_object_list(written, src=0)
        if written[0] is not None:
            # On every rank, because a judge may use the trainer's collectives.
            drawn, completions = written[0]
            rows, metrics, scores = rollouts.score_rollouts(
                drawn, completions, self.config, self.chat, self.judge, self.loss
            )
            self._keep_for_lake(drawn, completions, scores)
            random.Random(self.trainer.steps).shuffle(rows)
            self.rollout_metrics.update(metrics)
            self.student_rows = rows

    def _keep_for_lake(
        self,
        drawn: Sequence[rollouts.Continuation],
        completions: Sequence[Completion],
        scores: Sequence[rollouts.Score] | None,
    ) -> None:
        """Queue rollouts for the lake, under the first step that trains on them."""
        if self.rank == 0:
            prefix = f"rollout-{self.job.name}-{self.trainer.steps + 1}"
            more = rollouts.to_trajectories(prefix, drawn, completions, self.config, scores)
            self.unsaved += more

    def _sleep_engines(self) -> None:
        """Put engines that share the trainer's device to sleep, until the next weight update."""
        if self.job.learner.colocated and self.rank == 0:
            self.engines.sleep()

    def rows(self, step: int) -> list[TrainingExample]:
        """Return the training examples of ``step``, of all ranks."""
        every = self.config.rollout_every
        return self.data.rows(step) + self.student_rows[step % every :: every]

    # --- state --------------------------------------------------------------------

    def _report(self, step: int, rows: list[TrainingExample], metrics: dict[str, float]) -> None:
        self.tokens += trained_tokens(rows)
        counts = {"trained_tokens": self.tokens, "workers": self.world}
        all_metrics = {**metrics, **self.rollout_metrics, **counts}
        self.reports.append(StepReport(step + 1, all_metrics))
        self.backend.report(self.reports[-1])
        self.rollout_metrics = {}

    def _write_lake(self) -> None:
        """Append the rollouts to the lake. Those repeated after a crash have the same uids and count once."""
        if self.unsaved:
            Lake(self.job.lake).append(to_batch(self.unsaved), TRAJECTORIES)
            self.unsaved = []

    def _save_checkpoint(self, step: int) -> None:
        self._write_lake()  # first: a job resumed from here does not collect them again
        state = self.trainer.state_dict()
        with tempfile.TemporaryDirectory(
            prefix="sleeprl-checkpoint-", ignore_cleanup_errors=True
        ) as scratch:
            directory = Path(scratch)
            checkpoint = TrainerCheckpoint(directory)
            if self.rank == 0:
                checkpoint.save_state(state)
                position = {
                    "job": self.job.name,
                    "tokens": self.tokens,
                    "version": self.engines.version,
                    "student_rows": [asdict(r) for r in self.student_rows],
                    "reports": [asdict(r) for r in self.reports],
                }
                (directory / POSITION).write_text(
                    json.dumps(position, default=float), encoding="utf-8"
                )
            checkpoint.save_teacher_cache(self.trainer)
            self.backend.save_checkpoint(step, directory)
        self.saved_step = step

    def _restore(self) -> None:
        with self.backend.latest_checkpoint() as directory:
            if directory is None:
                return
            position = read_json(directory / POSITION)
            if position.get("job", self.job.name) != self.job.name:
                return  # checkpoint of an earlier job in the same processes
            TrainerCheckpoint(directory).restore(self.trainer)
        self.tokens = position["tokens"]
        self.engines.record_update(max(self.engines.version, position["version"]))
        self.student_rows = [TrainingExample(**r) for r in position["student_rows"]]
        self.reports = [StepReport(**r) for r in position.get("reports", ())]
        self.backend.report(EarlierSteps(tuple(self.reports)))

    def finish(self) -> None:
        """Publish the final weights to the engines and, if the job has an output, save them."""
        if self.pending is not None:
            drawn, pending = self.pending
            self._keep_for_lake(drawn, pending.wait(), None)
        self._write_lake()
        self.trainer.finalise()
        publish_weights(self.trainer, self.engines, self.job.canary)
        if self.job.output:
            save_trained(self.trainer, Path(self.job.output), self.job.canary)
        verified = self.engines.health.working
        end = JobEnd(self.trainer.steps, self.tokens, self.engines.version, verified)
        self.backend.report(end)
