"""``sleeprl replay``: a run's dreaming again, with the learner alone or with the engines alone."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import ray

from sleeprl.cluster.actor_group import ActorGroup, RemoteActor
from sleeprl.cluster.runtime import cluster
from sleeprl.config.schema import ConfigError, NightConfig
from sleeprl.data.lake import Lake
from sleeprl.dreaming.checkpoint import DreamingCheckpoint
from sleeprl.dreaming.launch import (
    learner_job,
    make_tasks,
    set_in_flight_limit,
    spawn_scorers_and_rewards,
)
from sleeprl.dreaming.recovery import start_ranks
from sleeprl.dreaming.trainer_actor import DreamTrainer, DreamTrainerJob
from sleeprl.dreaming.types import Task, request
from sleeprl.evaluation.questions import Day
from sleeprl.memory.checkpoint import EXPERT
from sleeprl.night import run_dir as runs
from sleeprl.night.orchestrator import Night
from sleeprl.reporting.progress import NightProgress
from sleeprl.rollout.engine_pool import EnginePool
from sleeprl.self_study.sampler import build_qa_prompt
from sleeprl.self_study.study import load_probes
from sleeprl.trainer.publish import CANARY
from sleeprl.utils.files import sha256_file
from sleeprl.weight_sync.verification import Canary

KIND = "trajectories"


class Recorder(RemoteActor):
    """Reads and writes lakes for the driver, which moves references."""

    def updates(self, lake: str, rows: int) -> list[Any]:
        """What each update has learned from, ``rows`` dreams, in that order; by reference."""
        table = Lake(lake).read(KIND)
        dreams = table.filter(pc.equal(table.column("purpose"), "dream")).combine_chunks()
        return [ray.put(batch) for batch in dreams.to_batches(max_chunksize=rows)]

    def append(self, lake: str, batches: Sequence[Any]) -> None:
        Lake(lake).append(ray.get(list(batches)), KIND)


@dataclass(frozen=True)
class Replayed:
    """groups: of dreams. work: updates, or tokens."""

    groups: int
    work: int
    seconds: float


def learner_alone(config: NightConfig, job: DreamTrainerJob, output: Path) -> Replayed:
    """Learn from what is recorded in the job's lake; the expert is in ``output`` at the end."""
    resources, dreaming = config.resources, config.dreaming
    actor = ray.remote(DreamTrainer).options(
        num_cpus=resources.learner_cpus, num_gpus=resources.learner_gpus
    )
    world = resources.learner_workers
    learner = ActorGroup("learner", [actor.remote(job, rank, world) for rank in range(world)])
    recorder = _recorder()
    try:
        start_ranks(learner, DreamingCheckpoint(output))
        rows = dreaming.tasks_per_step * dreaming.group_size
        updates = recorder.call("updates", lake=job.lake, rows=rows)[0]
        began = time.monotonic()
        for batch in updates:
            learner.call("step", batches=[batch])
        seconds = time.monotonic() - began
        learner.call("finish", output=str(output.resolve()))
        return Replayed(len(updates) * dreaming.tasks_per_step, len(updates), seconds)
    finally:
        learner.kill()
        recorder.kill()


def engines_alone(
    config: NightConfig,
    fleet: EnginePool,
    job: DreamTrainerJob,
    tasks: Mapping[str, Task],
    admitted: Sequence[str],
    prompt: Callable[[str], list[int]],
    output: Path,
) -> Replayed:
    """Write and score the admitted groups with the weights that the engines have now. The batches
    go to the lake in ``output``. DATA and INFRA failures alike are raised."""
    engines = set_in_flight_limit(fleet.group, config.dreaming)
    scorers, rewards = spawn_scorers_and_rewards(config, job.learner)
    recorder, began, tokens = _recorder(), time.monotonic(), 0
    to_ask = deque(enumerate(admitted))
    to_score, to_reward = deque[tuple[str, Any]](), deque[tuple[str, Any]]()
    done: dict[int, Any] = {}
    try:
        while len(done) < len(admitted):
            while to_ask:
                number, task = to_ask[0]
                asked = request(config.dreaming, config.seed, number, tasks[task], prompt)
                if not engines.submit("rollout", str(number), **asked):
                    break
                to_ask.popleft()
            for result in engines.ended_or_raise():
                tokens += result.value["tokens"]
                to_score.append((result.tag, result.value["batch"]))
            for group, waiting in ((scorers, to_score), (rewards, to_reward)):
                while waiting:
                    tag, batch = waiting[0]
                    if not group.submit("score", tag, batch=batch, tasks=tasks):
                        break
                    waiting.popleft()
            to_reward += [(r.tag, r.value["batch"]) for r in scorers.ended_or_raise()]
            done |= {int(r.tag): r.value["batch"] for r in rewards.ended_or_raise(0.01)}
        seconds = time.monotonic() - began
        recorder.call("append", lake=str(output / "lake"), batches=[done[n] for n in sorted(done)])
        return Replayed(len(done), tokens, seconds)
    finally:
        for each in (scorers, rewards, recorder):
            each.kill()


def replay(directory: Path, *, engines_only: bool = False) -> str:
    """Replay the run in a directory, and say what came of it."""
    config = runs.resume(directory)
    position = DreamingCheckpoint.load((config.run_dir / "dreaming-state").resolve())
    if not position.version:
        raise ConfigError(f"{directory} has no updates of dreaming to replay")
    output = config.run_dir / "replay"
    run = runs.RunDirectory(config, NightProgress([]))
    with cluster(config.resources):
        night, day = Night(run), Day.load(run.dir / "day.json")
        selves, index = night.selves, night.selves.last
        fleet = selves.launch(index) if engines_only else EnginePool(ActorGroup("engine", []))
        night.attach(day, fleet)
        born = selves.expert(index)
        job = learner_job(
            config, selves.dreamer(), born, run.dir, night.canary, position.first_version
        )
        if engines_only:
            selves.send(fleet, selves.larger(index), Canary.load(born / CANARY))
            tasks = make_tasks(day.documents, load_probes(run.dir / "study.json"), config.seed)
            found = engines_alone(
                config, fleet, job, {task.id: task for task in tasks}, position.admitted[: position.done],
                lambda message: build_qa_prompt(night.chat, config.self_study, message), output,
            )  # fmt: skip
            fleet.shutdown()
        else:
            found = learner_alone(config, job, output)
    run.close()
    if engines_only:
        return (
            f"engines alone: {found.groups} groups, {found.work} tokens, "
            f"{found.work / found.seconds:,.0f} tokens/s with their scores; in {output / 'lake'}"
        )
    ends = [sha256_file(place / EXPERT) for place in (run.dir / "dreaming", output)]
    same = "the run's, to the bit" if ends[0] == ends[1] else "NOT the run's"
    return (
        f"learner alone: {found.work} updates on {found.groups} groups, "
        f"{found.seconds / found.work:.2f} s each; the expert {ends[1][:8]} is {same}"
    )


def _recorder() -> ActorGroup:
    return ActorGroup("recorder", [ray.remote(Recorder).options(num_cpus=0).remote()])
