"""Replays a run's dreaming with the trainer alone or with the engines alone (``sleeprl replay``)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import ray

from sleeprl.cluster.actor_group import ActorGroup
from sleeprl.cluster.remote_actor import RemoteActor
from sleeprl.cluster.runtime import cluster
from sleeprl.config.schema import ConfigError, NightConfig
from sleeprl.data.lake import TRAJECTORIES, Lake
from sleeprl.dreaming.checkpoint import DreamingCheckpoint
from sleeprl.dreaming.launch import (
    make_tasks,
    max_groups_in_flight,
    prompt_builder,
    spawn_scorers_and_rewards,
)
from sleeprl.dreaming.recovery import start_ranks
from sleeprl.dreaming.trainer_actor import DreamTrainer, DreamTrainerJob
from sleeprl.dreaming.types import Task, build_request
from sleeprl.memory.checkpoint import EXPERT
from sleeprl.night import run_dir as runs
from sleeprl.night.context import STUDY, Night
from sleeprl.night.phases import dreaming_context
from sleeprl.night.run_dir import LAKE
from sleeprl.reporting.progress import NightProgress
from sleeprl.rollout.engine_pool import EnginePool
from sleeprl.rollout.types import RolloutRequest
from sleeprl.self_study.study import load_probes
from sleeprl.trainer.publish import CANARY
from sleeprl.utils.files import sha256_file
from sleeprl.weight_sync.verification import Canary


class Recorder(RemoteActor):
    """Reads and writes lakes for the driver, which moves references only."""

    def read_updates(self, lake: str, rows: int) -> list[Any]:
        """Read the dreams of each update, in the order of the updates.

        Args:
            lake: Directory of the lake.
            rows: Dreams of an update.

        Returns:
            A reference to the batch of each update.
        """
        table = Lake(lake).read(TRAJECTORIES)
        dreams = table.filter(pc.equal(table.column("purpose"), "dream")).combine_chunks()
        return [ray.put(batch) for batch in dreams.to_batches(max_chunksize=rows)]

    def append(self, lake: str, batches: Sequence[Any]) -> None:
        """Append batches, given by reference, to a lake."""
        Lake(lake).append(ray.get(list(batches)), TRAJECTORIES)


@dataclass(frozen=True)
class ReplayResult:
    """The outcome of a replay."""

    groups: int
    """Number of groups of dreams."""
    work: int
    """Number of updates (trainer alone) or of tokens (engines alone)."""
    seconds: float
    """Duration of the updates, or of generation and scoring."""
    output: Path
    """Directory of the written expert or lake."""
    expert: str = ""
    """SHA-256 of the replayed expert; empty for the engines alone."""
    same_expert: bool = False
    """Whether it equals the run's expert to the bit."""

    def describe(self) -> str:
        """Describe the result in one line."""
        if not self.expert:
            return (
                f"engines alone: {self.groups} groups, {self.work} tokens, "
                f"{self.work / self.seconds:,.0f} tokens/s with their scores; in {self.output / LAKE}"
            )
        same = "the run's, to the bit" if self.same_expert else "NOT the run's"
        return (
            f"learner alone: {self.work} updates on {self.groups} groups, "
            f"{self.seconds / self.work:.2f} s each; the expert {self.expert[:8]} is {same}"
        )


def replay(directory: Path, *, engines_only: bool = False) -> ReplayResult:
    """Replay a run's dreaming: the trainer on the recorded dreams, or the engines without training.

    Args:
        directory: The run; results go into ``replay`` in it.
        engines_only: Generate and score the same groups, and train nothing.

    Raises:
        ConfigError: The run has no updates of dreaming.
    """
    config = runs.resume(directory)
    position = DreamingCheckpoint.load((config.run_dir / "dreaming-state").resolve())
    if not position.version:
        raise ConfigError(f"{directory} has no updates of dreaming to replay")
    run = runs.RunDirectory(config, NightProgress([]))
    try:
        with cluster(config.resources):
            night, output = Night(run), run.dir / "replay"
            job = dreaming_context(night).trainer_job(position.first_version)
            if engines_only:
                done = position.task_ids[: position.num_finished]
                return replay_engines(night, job, done, output)
            return replay_trainer(config, job, output, run.dir / "dreaming")
    finally:
        run.close()


def replay_trainer(
    config: NightConfig, job: DreamTrainerJob, output: Path, original: Path
) -> ReplayResult:
    """Train on the dreams that are recorded in the job's lake.

    Args:
        config: The settings of the run.
        job: The job of the run's trainer.
        output: Directory for the expert.
        original: Directory of the run's own expert, to compare with.
    """
    resources, dreaming = config.resources, config.dreaming
    actor = ray.remote(DreamTrainer).options(
        num_cpus=resources.learner_cpus, num_gpus=resources.learner_gpus
    )
    world = resources.learner_workers
    trainer = ActorGroup("learner", [actor.remote(job, rank, world) for rank in range(world)])
    recorder = _start_recorder()
    try:
        start_ranks(trainer, DreamingCheckpoint(output))
        rows = dreaming.tasks_per_step * dreaming.group_size
        updates = recorder.call("read_updates", lake=job.lake, rows=rows)[0]
        began = time.monotonic()
        for batch in updates:
            trainer.call("step", batches=[batch])
        seconds = time.monotonic() - began
        trainer.call("finish", output=str(output.resolve()))
    finally:
        trainer.kill()
        recorder.kill()
    theirs, ours = (sha256_file(place / EXPERT) for place in (original, output))
    groups = len(updates) * dreaming.tasks_per_step
    return ReplayResult(groups, len(updates), seconds, output, ours, ours == theirs)


def replay_engines(
    night: Night, job: DreamTrainerJob, admitted: Sequence[str], output: Path
) -> ReplayResult:
    """Generate and score the admitted groups with the weights from the start of dreaming.

    Every failure is raised; nothing is restarted.

    Args:
        night: The run; its engines are started and stopped.
        job: The job of the run's trainer.
        admitted: Task ids of the groups, in order of admission.
        output: Directory for the lake of the results.
    """
    config, stages, last = night.config, night.stages, night.stages.last_step
    pool = night.start_engines(last)
    try:
        canary = Canary.load(stages.expert_directory(last) / CANARY)
        stages.publish_tensors(pool, stages.grown_tensors(last), canary)
        probes = load_probes(night.run.dir / STUDY)
        tasks = {task.id: task for task in make_tasks(night.day.documents, probes, config)}

        build_prompt = prompt_builder(config, night.chat)
        requests = [
            build_request(config.dreaming, config.seed, number, tasks[task], build_prompt)
            for number, task in enumerate(admitted)
        ]
        return _generate_and_score(config, pool, job, tasks, requests, output)
    finally:
        night.stop_engines()


def _generate_and_score(
    config: NightConfig,
    pool: EnginePool,
    job: DreamTrainerJob,
    tasks: Mapping[str, Task],
    requests: Sequence[RolloutRequest],
    output: Path,
) -> ReplayResult:
    """Run three stages side by side, each as full as its actors allow: generate, score, reward."""
    engines = pool.lease(max_groups_in_flight(config.dreaming))
    scorers, rewards = spawn_scorers_and_rewards(config, job.trainer)
    recorder, began, tokens = _start_recorder(), time.monotonic(), 0
    to_generate = deque(enumerate(requests))
    to_score, to_reward = deque[tuple[str, Any]](), deque[tuple[str, Any]]()
    done: dict[int, Any] = {}
    try:
        while len(done) < len(requests):
            while to_generate:
                number, group_request = to_generate[0]
                if not engines.submit("rollout", str(number), request=group_request):
                    break
                to_generate.popleft()
            for result in engines.ready_or_raise():
                tokens += result.value.num_tokens
                to_score.append((result.tag, result.value.batch))
            for group, waiting in ((scorers, to_score), (rewards, to_reward)):
                while waiting:
                    tag, batch = waiting[0]
                    if not group.submit("score", tag, batch=batch, tasks=tasks):
                        break
                    waiting.popleft()
            to_reward += [(r.tag, r.value.batch) for r in scorers.ready_or_raise()]
            done |= {int(r.tag): r.value.batch for r in rewards.ready_or_raise(0.01)}
        seconds = time.monotonic() - began
        recorder.call("append", lake=str(output / LAKE), batches=[done[n] for n in sorted(done)])
        return ReplayResult(len(done), tokens, seconds, output)
    finally:
        for each in (scorers, rewards, recorder):
            each.kill()


def _start_recorder() -> ActorGroup:
    return ActorGroup("recorder", [ray.remote(Recorder).options(num_cpus=0).remote()])
