"""The loop of one consolidation worker: plain steps, rollouts from the engines in between.

Every rank calls everything that is collective in the same order; only rank 0 speaks to the engines.
What runs the loop is a ``TrainLoopBackend``; a night's is Ray Train (``ray_job``).
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow.compute as pc
import torch.distributed as dist

from sleeprl.cluster.actor_group import ActorGroup
from sleeprl.config.methods import METHODS
from sleeprl.config.schema import ConsolidationConfig, FixedCapacityConfig
from sleeprl.consolidation import student_rollouts as rollouts
from sleeprl.consolidation.data_mix import DataMix, trained_tokens
from sleeprl.consolidation.judges import make_judge
from sleeprl.consolidation.messages import JobEnd, Report, StepReport
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

POSITION = "position.json"


@dataclass(frozen=True)
class Job:
    """One training job, plain enough to travel to the workers."""

    method: str
    """A name in ``METHODS``."""
    learner: TrainerOptions
    config: ConsolidationConfig
    fixed: FixedCapacityConfig
    seed: int
    lake: str
    """Directory of the self-study texts; the rollouts go there too."""
    output: str
    """Directory of the trained expert; empty for a baseline, of which only the figures stay."""
    canary: list[int]
    """Token ids that trainer and engines both score after each update."""
    first_version: int
    """Version of the first weights that are sent."""
    passages: list[list[int]] = field(default_factory=list)
    """Token ids of the documents."""
    tokens: int = 0
    """Stop when so many were trained on; 0: no budget."""

    @property
    def name(self) -> str:
        """Name of the job; no other on the same lake has it."""
        return Path(self.output).name or self.method


def load_data_mix(job: Job) -> DataMix:
    """Read what the job learns from; texts that its method does not read are left out."""
    method = METHODS[job.method]
    table = Lake(job.lake).read(TRAJECTORIES)
    texts = from_batch(table.filter(pc.field("purpose").isin(["self_study", "replay"])))
    return DataMix(method, texts, job.passages, method.objective(job.config), job.seed)


class TrainLoopBackend(Protocol):
    """What keeps the loop's checkpoints and passes its figures on. Called on every rank."""

    def latest_checkpoint(self) -> AbstractContextManager[Path | None]:
        """Return the last checkpoint, a directory to read from, if there is one."""
        ...

    def save_checkpoint(self, step: int, directory: Path) -> None:
        """Copy all ranks' directories, as one, as the checkpoint after ``step``."""
        ...

    def report(self, report: Report) -> None:
        """Pass on what happened: a step, or the end of the job."""
        ...


def learn(
    job: Job, engines: Sequence[Any], backend: TrainLoopBackend, teachers: Sequence[Any] = ()
) -> None:
    """Do the job, on from its last checkpoint. Collective.

    Args:
        job: What to train.
        engines: Handles of the engines.
        backend: Keeps checkpoints and passes figures on.
        teachers: Handles of the teachers; without any the trainer's own module teaches.
    """
    TrainWorker(job, engines, backend, teachers).run()


class TrainWorker:
    """One rank of a training job: its trainer, its data, and the rollouts under way."""

    def __init__(
        self, job: Job, engines: Sequence[Any], backend: TrainLoopBackend, teachers: Sequence[Any]
    ) -> None:
        """Load the model and the data, and go back to the last checkpoint. Collective."""
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
        """Rank 0's: what the engines are writing now."""
        self.student_rows: list[TrainingExample] = []
        """The last rollouts, over all ranks."""
        self.unsaved: list[Trajectory] = []
        """Rank 0's: rollouts since the last checkpoint, for the lake."""
        self.rollout_metrics: dict[str, float] = {}
        """Reported with the next step."""
        self.tokens = 0
        """Trained on so far."""
        self._restore()
        self.saved_step = self.trainer.steps

    def run(self) -> None:
        """Train to the last step, or as many tokens as the job may train on. Collective."""
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
        """Every ``rollout_every`` steps: take the rollouts, send the weights, ask for the next rollouts.

        Generation overlaps learning, unless rollouts are all there is to learn from, or both share a
        device. Checkpoints are taken in between, where nothing is under way.
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
        """Take what was asked for; where nothing was, what a checkpoint brought stays."""
        written: list[Any] = [None]
        if self.pending is not None:
            drawn, pending = self.pending
            written, self.pending = [(drawn, pending.wait())], None
            self._sleep_engines()
        if self.world > 1:
            dist.broadcast_object_list(written, src=0)
        if written[0] is not None:
            # On every rank alike, because a judge may ask the trainer.
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
        """Keep rollouts for the lake, under the step that is the first to learn from them."""
        if self.rank == 0:
            prefix = f"rollout-{self.job.name}-{self.trainer.steps + 1}"
            more = rollouts.to_trajectories(prefix, drawn, completions, self.config, scores)
            self.unsaved += more

    def _sleep_engines(self) -> None:
        """Where engines and trainer share a device, it is the trainer's until the next update."""
        if self.job.learner.colocated and self.rank == 0:
            self.engines.sleep()

    def rows(self, step: int) -> list[TrainingExample]:
        """Return what is learnt from in ``step``, over all ranks."""
        every = self.config.rollout_every
        return self.data.rows(step) + self.student_rows[step % every :: every]

    # --- state --------------------------------------------------------------------

    def _report(self, step: int, rows: list[TrainingExample], metrics: dict[str, float]) -> None:
        self.tokens += trained_tokens(rows)
        counts = {"trained_tokens": self.tokens, "workers": self.world}
        all_metrics = {**metrics, **self.rollout_metrics, **counts}
        self.backend.report(StepReport(step + 1, all_metrics))
        self.rollout_metrics = {}

    def _write_lake(self) -> None:
        """Append the rollouts. What is done again after a crash has the same uids, and counts once."""
        if self.unsaved:
            Lake(self.job.lake).append(to_batch(self.unsaved), TRAJECTORIES)
            self.unsaved = []

    def _save_checkpoint(self, step: int) -> None:
        self._write_lake()  # first: a job that goes on from here does not see them again
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
                }
                (directory / POSITION).write_text(json.dumps(position))
            checkpoint.save_teacher_cache(self.trainer)
            self.backend.save_checkpoint(step, directory)
        self.saved_step = step

    def _restore(self) -> None:
        with self.backend.latest_checkpoint() as directory:
            if directory is None:
                return
            position = json.loads((directory / POSITION).read_text())
            if position.get("job", self.job.name) != self.job.name:
                return  # of a job before this one, in the same processes
            TrainerCheckpoint(directory).restore(self.trainer)
        self.tokens = position["tokens"]
        self.engines.record_update(max(self.engines.version, position["version"]))
        self.student_rows = [TrainingExample(**r) for r in position["student_rows"]]

    def finish(self) -> None:
        """Leave the final weights in the engines and, where it is wanted, on disk."""
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
