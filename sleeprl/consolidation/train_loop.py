"""The loop of one consolidation worker: plain steps, roll-outs from the engines in between.

Every rank calls everything that is collective in the same order; only rank 0 speaks to
the engines. What runs the loop is a ``TrainLoopBackend``; a night's is Ray Train (``job``).
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow.compute as pc
import torch.distributed as dist

from sleeprl.cluster.actor_group import ActorGroup
from sleeprl.config.methods import METHODS
from sleeprl.config.schema import ConsolidationConfig, FixedCapacityConfig
from sleeprl.consolidation import student_rollouts as imitation
from sleeprl.consolidation.data_mix import DataMix, trained_tokens
from sleeprl.consolidation.judges import make_judge
from sleeprl.data.lake import Lake
from sleeprl.data.trajectory import Trajectory, from_batch, to_batch
from sleeprl.losses.combined import LossOptions
from sleeprl.losses.off_policy import ImportanceWeight
from sleeprl.plugins import create
from sleeprl.rollout.engine_pool import LIVENESS_TIMEOUT_S, EnginePool, PendingResults
from sleeprl.rollout.types import Completion
from sleeprl.text.chat import ChatFormatter
from sleeprl.trainer.batching import TrainingExample
from sleeprl.trainer.checkpoint import TrainerCheckpoint
from sleeprl.trainer.options import TrainerOptions
from sleeprl.trainer.publish import publish, save_trained
from sleeprl.trainer.teacher import Teachers
from sleeprl.trainer.trainer import Trainer

KIND = "trajectories"
POSITION = "position.json"


@dataclass(frozen=True)
class Job:
    """One training job, plain enough to travel to the workers.

    method: a name in ``METHODS``. lake: where the self-study texts are, and the roll-outs go.
        passages: token ids of the documents. output: where the trained expert goes; empty
        for a baseline, of which only the measurement stays. first_version: weight version
        of the first publication. tokens: stop when so many were trained on; 0 is no budget.
    """

    method: str
    learner: TrainerOptions
    config: ConsolidationConfig
    fixed: FixedCapacityConfig
    seed: int
    lake: str
    output: str
    canary: list[int]
    first_version: int
    passages: list[list[int]] = field(default_factory=list)
    tokens: int = 0

    @property
    def name(self) -> str:
        """No other job on the same lake has it."""
        return Path(self.output).name or self.method


def feed(job: Job) -> DataMix:
    """What the job learns from; rows that its method does not read are left out."""
    method = METHODS[job.method]
    table = Lake(job.lake).read(KIND)
    texts = from_batch(table.filter(pc.field("purpose").isin(["self_study", "replay"])))
    return DataMix(method, texts, job.passages, method.objective(job.config), job.seed)


class TrainLoopBackend(Protocol):
    """What keeps the loop's checkpoints and passes its figures on. Called on every rank."""

    def kept(self) -> AbstractContextManager[Path | None]:
        """The last checkpoint, a directory to read from, if there is one."""
        ...

    def keep(self, step: int, directory: Path) -> None:
        """Take a copy of all ranks' directories, as one, as the checkpoint after ``step``."""
        ...

    def tell(self, record: dict[str, Any]) -> None:
        """A step's figures; at the end one record more: ``end`` with step, tokens, version, and
        the engines that are verified at it."""
        ...


def learn(
    job: Job, engines: list[Any], shell: TrainLoopBackend, teachers: Sequence[Any] = ()
) -> None:
    """Do the job, on from its last checkpoint. engines, teachers: actor handles."""
    worker = _Worker(job, engines, shell, teachers)
    for step in range(worker.learner.steps, job.learner.total_steps):
        if job.tokens and worker.tokens >= job.tokens:
            break
        worker.exchange(step)
        rows = worker.rows(step)
        metrics = worker.learner.step(rows, worker.feed.parts(step), worker.loss)
        worker.report(step, rows, metrics)
    worker.finish()


class _Worker:
    def __init__(
        self, job: Job, engines: list[Any], shell: TrainLoopBackend, teachers: Sequence[Any]
    ) -> None:
        self.job, self.shell = job, shell
        self.learner = Trainer(job.learner, Teachers(teachers) if teachers else None)
        self.rank, self.world = self.learner.rank, self.learner.world
        self.fleet = EnginePool(ActorGroup("engine", engines, silence=LIVENESS_TIMEOUT_S))
        self.fleet.version = job.first_version - 1
        self._sleep()
        method = METHODS[job.method]
        self.config = config = method.objective(job.config)
        self.feed = feed(job)
        self.loss = LossOptions(
            beta=config.beta,
            top_k=config.top_k,
            support=config.support,
            pointwise_clip=config.pointwise_clip,
            policy=create(config.algorithm, "algorithm", config.algorithm_options),
            limit=imitation.longest([*self.feed.new, *self.feed.replay]),
            correction=ImportanceWeight("off"),
        )
        if method.anchored:
            own = random.Random(f"{job.seed}-fisher").sample(self.feed.own, len(self.feed.own))
            self.learner.add_ewc_penalty(own[: job.fixed.fisher_texts], job.fixed.ewc)
        self.chat = ChatFormatter(job.learner.checkpoint)
        self.judge = make_judge(config.judge, config.judge_options, self.learner, self.chat)
        self.pending: tuple[list[imitation.Continuation], PendingResults] | None = None
        self.student_rows: list[TrainingExample] = []
        self.unsaved: list[Trajectory] = []
        """Rank 0's: roll-outs since the last checkpoint, for the lake."""
        self.extra: dict[str, float] = {}
        self.tokens = 0
        self._restore()
        self.saved = self.learner.steps

    # --- roll-outs ----------------------------------------------------------------

    def exchange(self, step: int) -> None:
        """Every ``rollout_every`` steps: take the roll-outs that the engines wrote meanwhile,
        send them the present weights, and ask for the next ones. Generation overlaps learning,
        unless roll-outs are all there is to learn from, or both share a device. Checkpoints are
        taken in between, where nothing is under way."""
        config, rollouts = self.config, self.feed.rollouts
        if rollouts and step % config.rollout_every:
            return
        if rollouts:
            self._collect()
        if step - self.saved >= config.checkpoint_every:
            self._checkpoint(step)
        if not rollouts:
            return
        self.extra.update(publish(self.learner, self.fleet, self.job.canary))
        if self.rank == 0:
            rng = random.Random(f"{self.job.seed}-rollouts-{step}")
            old = round(config.rollout_prompts * self.feed.replay_share)
            drawn = imitation.draw(self.feed.new, config.rollout_prompts - old, config, rng)
            drawn += imitation.draw(self.feed.replay, old, config, rng) if old else []
            prompts, sampling = imitation.requests(drawn, config, rng)
            self.pending = (drawn, self.fleet.generate_later(prompts, sampling))
        if not self.feed.streams or self.job.learner.colocated:
            self._collect()

    def _collect(self) -> None:
        """Take what was asked for; where nothing was, what a checkpoint brought stays."""
        written: list[Any] = [None]
        if self.pending is not None:
            drawn, pending = self.pending
            written, self.pending = [(drawn, pending.wait())], None
            self._sleep()
        if self.world > 1:
            dist.broadcast_object_list(written, src=0)
        if written[0] is not None:
            # On every rank alike, because a judge may ask the learner.
            drawn, completions = written[0]
            rows, told, judged = imitation.rows(
                drawn, completions, self.config, self.chat, self.judge, self.loss
            )
            self._note(drawn, completions, judged)
            random.Random(self.learner.steps).shuffle(rows)
            self.extra.update(told)
            self.student_rows = rows

    def _note(
        self, drawn: Sequence[imitation.Continuation], completions: Sequence[Completion],
        judged: Sequence[imitation.Judged] | None,
    ) -> None:  # fmt: skip
        """Keep roll-outs for the lake, under the step that is the first to learn from them."""
        if self.rank == 0:
            prefix = f"rollout-{self.job.name}-{self.learner.steps + 1}"
            self.unsaved += imitation.trajectories(prefix, drawn, completions, self.config, judged)

    def _sleep(self) -> None:
        """Where engines and learner share a device, it is the learner's until the next update."""
        if self.job.learner.colocated and self.rank == 0:
            self.fleet.sleep()

    def rows(self, step: int) -> list[TrainingExample]:
        """What is learnt from in ``step``, over all ranks."""
        every = self.config.rollout_every
        return self.feed.rows(step) + self.student_rows[step % every :: every]

    # --- state --------------------------------------------------------------------

    def report(self, step: int, rows: list[TrainingExample], metrics: dict[str, float]) -> None:
        self.tokens += trained_tokens(rows)
        figures = {**metrics, **self.extra, "trained_tokens": self.tokens, "workers": self.world}
        self.shell.tell({"step": step + 1, **figures})
        self.extra = {}

    def _to_the_lake(self) -> None:
        """What is done again after a crash has the same uids, and counts once."""
        if self.unsaved:
            Lake(self.job.lake).append(to_batch(self.unsaved), KIND)
            self.unsaved = []

    def _checkpoint(self, step: int) -> None:
        self._to_the_lake()  # first: a job that goes on from here does not see them again
        state = self.learner.state_dict()
        with _scratch() as directory:
            checkpoint = TrainerCheckpoint(directory)
            if self.rank == 0:
                checkpoint.save_state(state)
                position = {
                    "tokens": self.tokens,
                    "version": self.fleet.version,
                    "student_rows": [asdict(r) for r in self.student_rows],
                }
                (directory / POSITION).write_text(json.dumps(position))
            checkpoint.save_teacher_cache(self.learner)
            self.shell.keep(step, directory)
        self.saved = step

    def _restore(self) -> None:
        with self.shell.kept() as directory:
            if directory is None:
                return
            TrainerCheckpoint(directory).restore(self.learner)
            position = json.loads((directory / POSITION).read_text())
        self.tokens = position["tokens"]
        self.fleet.version = max(self.fleet.version, position["version"])
        self.student_rows = [TrainingExample(**r) for r in position["student_rows"]]

    def finish(self) -> None:
        """Leave the final weights in the engines and, where it is wanted, on disk."""
        if self.pending is not None:
            drawn, pending = self.pending
            self._note(drawn, pending.wait(), None)
        self._to_the_lake()
        self.learner.finalise()
        publish(self.learner, self.fleet, self.job.canary)
        if self.job.output:
            save_trained(self.learner, Path(self.job.output), self.job.canary)
        end = {
            "step": self.learner.steps,
            "tokens": self.tokens,
            "version": self.fleet.version,
            "verified": self.fleet.health.working,
        }
        self.shell.tell({"end": end})


@contextmanager
def _scratch() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="sleeprl-checkpoint-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
