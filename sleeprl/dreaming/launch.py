"""Starts the actors of dreaming, runs the pipeline, and stops them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from sleeprl.cluster.actor_group import ActorGroup
from sleeprl.cluster.waits import WAITS
from sleeprl.cluster.warm import WARM, processes_may_wait
from sleeprl.config.schema import ConfigError, DreamingConfig, NightConfig
from sleeprl.data.lake import TRAJECTORIES, Lake
from sleeprl.data.trajectory import from_batch
from sleeprl.dreaming.admission import AdmissionQueue
from sleeprl.dreaming.checkpoint import DreamingCheckpoint
from sleeprl.dreaming.curricula import CurriculumActor
from sleeprl.dreaming.formats import format_of
from sleeprl.dreaming.messages import PublishResult
from sleeprl.dreaming.pipeline import OnStep, Pipeline
from sleeprl.dreaming.recovery import RecoveryManager, start_ranks
from sleeprl.dreaming.reward_actor import RewardActor
from sleeprl.dreaming.scorer import LearningGainScorer
from sleeprl.dreaming.trainer_actor import DreamTrainer, DreamTrainerJob
from sleeprl.dreaming.types import Task, algorithm_of
from sleeprl.rollout.engine import EngineOptions, spawn_engine
from sleeprl.rollout.engine_pool import EnginePool
from sleeprl.self_study.study import Pair
from sleeprl.text.chat import ChatFormatter
from sleeprl.trainer.options import TrainerOptions
from sleeprl.trainer.setup import warm_up


@dataclass(frozen=True)
class DreamingContext:
    """The inputs of dreaming."""

    config: NightConfig
    trainer: TrainerOptions
    """Options of the trainer."""
    expert: Path
    """Directory of the consolidated expert, which dreaming trains further."""
    run_dir: Path
    """Directory of the run: the lake is in ``lake``, the state in ``dreaming-state``, the result in
    ``dreaming``."""
    chat: ChatFormatter
    documents: Sequence[str]
    """Texts of the day."""
    probes: Sequence[Pair]
    """Questions about the documents that are held out from training."""
    canary: list[int]
    """Token ids that trainer and engines both score after each update."""

    def trainer_job(self, first_version: int) -> DreamTrainerJob:
        """Describe the trainer's job.

        Args:
            first_version: Policy version of the engines before the first update.
        """
        seeding = self.config.consolidation
        return DreamTrainerJob(
            trainer=self.trainer,
            config=self.config.dreaming,
            expert=str(self.expert.resolve()),
            lake=str((self.run_dir / "lake").resolve()),
            seed=self.config.seed,
            beta=seeding.beta,
            top_k=seeding.top_k,
            canary=self.canary,
            first_version=first_version,
            stall_seconds=self.config.resources.stall_seconds,
        )


def make_tasks(documents: Sequence[str], probes: Sequence[Pair], config: NightConfig) -> list[Task]:
    """Make a task of each document that has probes, with its probes shuffled.

    Args:
        documents: Texts of the day.
        probes: Held-out questions about them.
        config: The settings of the night; they name the format of dreams.

    Raises:
        ConfigError: No document has probes, so dreams cannot be scored.
    """
    tasks, form = [], format_of(config.dreaming)
    for number, document in enumerate(documents):
        about = [(p.question, p.answer) for p in probes if p.document == number]
        random.Random(f"{config.seed}-probes-{number}").shuffle(about)
        if about:
            prompt = form.prompt(document, config.self_study.few_shot_examples)
            name = f"document-{number}"
            tasks.append(Task(name, number, prompt.message, tuple(about), prompt.examples))
    if not tasks:
        raise ConfigError(
            "dreaming.enabled=true, but self-study left no document with probes to judge dreams on; raise "
            "self_study.held_out_share or pairs_per_document, or set dreaming.enabled=false"
        )
    return tasks


def prompt_builder(config: NightConfig, chat: ChatFormatter) -> Callable[[Task], list[int]]:
    """Return a function from a task to the token ids of its prompt."""
    prefix = config.self_study.assistant_prefix
    return lambda task: chat.prompt(task.message, prefix, task.examples)


@dataclass(frozen=True)
class DreamingActors:
    """All actors of dreaming except the engines."""

    learners: ActorGroup
    """The ranks of the trainer."""
    scorers: ActorGroup
    rewards: ActorGroup
    curriculum: ActorGroup
    new_engine: Callable[[int], Any]
    """Starts the engine of an index."""
    new_learner: Callable[[int], Any]
    """Starts the trainer actor of a rank."""

    def start(self, checkpoint: DreamingCheckpoint, engines: ActorGroup) -> None:
        """Restore a checkpoint and synchronise the weights.

        Afterwards engines and scorers have the trainer's weights. Only engines that are verified to
        have them get work.

        Args:
            checkpoint: The checkpoint to continue from.
            engines: The engines of the phase.
        """
        self.curriculum.call("ping")
        self.rewards.call("ping")
        if checkpoint.curriculum_state is not None:
            self.curriculum.call("load_state_dict", state=checkpoint.curriculum_state)
        start_ranks(self.learners, checkpoint)
        sent: PublishResult = self.learners.call("publish", engines=engines.actors)[0]
        self.scorers.call("set_expert", expert=sent.expert)
        engines.updated(sent.verified)

    @property
    def groups(self) -> tuple[ActorGroup, ...]:
        """All groups of actors except the engines."""
        return self.learners, self.scorers, self.rewards, self.curriculum

    def kill(self) -> None:
        """Kill all of them."""
        for group in self.groups:
            group.kill()


def spawn_unreserved(actor: Any, *arguments: Any, count: int = 1, gpus: float = 0.0) -> list[Any]:
    """Start actors that run in the gaps of the others, so they reserve no core.

    Args:
        actor: The actor class.
        arguments: Arguments of its constructor.
        count: Number of actors.
        gpus: GPUs that each reserves.
    """
    return [WARM.spawn(actor, *arguments, gpus=gpus) for _ in range(count)]


def prestart_actors(config: NightConfig, trainer: TrainerOptions) -> None:
    """Start processes for the actors of dreaming in the background: they import and wait.

    It starts only processes without a GPU, and only on this machine's own Ray: elsewhere they would
    take room from others while they wait.

    Args:
        config: The settings of the night.
        trainer: Options of the trainer to come.
    """
    resources = config.resources
    if resources.address is not None:
        return
    if not resources.learner_gpus:
        WARM.prestart(DreamTrainer, resources.learner_workers, partial(warm_up, trainer))
    if not resources.scorer_gpus:
        load = partial(LearningGainScorer, trainer, config.dreaming)
        WARM.prestart(LearningGainScorer, resources.scorers, load)
    WARM.prestart(RewardActor, resources.reward_workers, partial(ChatFormatter, trainer.checkpoint))
    WARM.prestart(CurriculumActor, 1, dict)


def spawn_scorers_and_rewards(
    config: NightConfig, trainer: TrainerOptions
) -> tuple[ActorGroup, ActorGroup]:
    """Start the scorers and the reward actors."""
    dreaming, resources = config.dreaming, config.resources
    gpus = resources.scorer_gpus
    scorers = spawn_unreserved(
        LearningGainScorer, trainer, dreaming, bool(gpus), count=resources.scorers, gpus=gpus
    )
    rewards = spawn_unreserved(
        RewardActor, trainer.checkpoint, dreaming, count=resources.reward_workers
    )
    return ActorGroup("scorer", scorers), ActorGroup("reward", rewards)


def spawn_trainer(config: NightConfig, job: DreamTrainerJob, rank: int) -> Any:
    """Start the trainer actor of a rank."""
    resources = config.resources
    # The waiting processes of consolidation may still reserve the cores.
    cpus = 0 if processes_may_wait(resources) else resources.learner_cpus
    gpus = resources.learner_gpus
    return WARM.spawn(DreamTrainer, job, rank, resources.learner_workers, cpus=cpus, gpus=gpus)


def launch(
    config: NightConfig,
    job: DreamTrainerJob,
    tasks: Sequence[Task],
    placement: Any = None,
) -> DreamingActors:
    """Start all actors of dreaming except the engines.

    Args:
        config: The settings of the night.
        job: The trainer's job.
        tasks: Tasks for the curriculum to choose from.
        placement: Placement group of the engines; a restarted engine takes its place there.
    """
    dreaming, resources, trainer = config.dreaming, config.resources, job.trainer
    new_learner = partial(spawn_trainer, config, job)
    curriculum = spawn_unreserved(
        CurriculumActor, dreaming.curriculum, dreaming.curriculum_options, tasks, config.seed
    )
    return DreamingActors(
        ActorGroup("learner", [new_learner(rank) for rank in range(resources.learner_workers)]),
        *spawn_scorers_and_rewards(config, trainer),
        ActorGroup("curriculum", curriculum),
        partial(
            spawn_engine,
            options=EngineOptions.from_config(config, trainer.checkpoint, trainer.dtype),
            cpus=resources.engine_cpus,
            gpus=resources.engine_gpus,
            engine=resources.engine,
            placement=placement,
        ),
        new_learner,
    )


def build_pipeline(
    context: DreamingContext,
    actors: DreamingActors,
    engines: ActorGroup,
    tasks: Sequence[Task],
    checkpoint: DreamingCheckpoint,
    on_restart: Callable[[str], None],
) -> Pipeline:
    """Build the pipeline over running actors.

    Args:
        context: The inputs of dreaming.
        actors: All actors except the engines.
        engines: The engines.
        tasks: All tasks.
        checkpoint: The checkpoint to continue from.
        on_restart: Receives a message for each restart.
    """
    config, dreaming = context.config, context.config.dreaming
    rounds = algorithm_of(dreaming).max_resample_rounds
    return Pipeline(
        config=dreaming,
        tasks={task.id: task for task in tasks},
        engines=engines,
        scorers=actors.scorers,
        rewards=actors.rewards,
        curriculum=actors.curriculum,
        learner=actors.learners,
        build_prompt=prompt_builder(config, context.chat),
        seed=config.seed,
        queue=AdmissionQueue(
            checkpoint,
            dreaming.tasks_per_step,
            dreaming.max_staleness,
            rounds * dreaming.tasks_per_step,
        ),
        recovery=RecoveryManager(
            engines,
            actors.learners,
            actors.new_engine,
            actors.new_learner,
            config.resources.max_failures,
            on_restart,
        ),
        colocated=config.resources.layout == "colocated",
    )


def max_groups_in_flight(dreaming: DreamingConfig) -> int:
    """Return the largest number of groups in flight, all of which may be on one engine."""
    return (dreaming.max_staleness + 2) * dreaming.tasks_per_step


def run_dreaming(
    context: DreamingContext,
    pool: EnginePool,
    on_restart: Callable[[str], None],
    on_step: OnStep,
) -> dict[str, Any]:
    """Dream for ``dreaming.steps`` updates, or for the rest of them after a checkpoint.

    Args:
        context: The inputs of dreaming.
        pool: Engines that serve the model; afterwards they serve the dreaming expert.
        on_restart: Receives a message for each restart.
        on_step: Receives the number of each update, from 1, and its metrics.

    Returns:
        The number of ``dreams``, ``idle`` seconds by actor and kind of wait, and ``samples`` for
        the report; the expert is in ``run_dir/dreaming``.
    """
    config, run_dir = context.config, context.run_dir
    tasks = make_tasks(context.documents, context.probes, config)
    checkpoint = DreamingCheckpoint.load((run_dir / "dreaming-state").resolve(), pool.version + 1)
    engines = pool.lease(max_groups_in_flight(config.dreaming))
    job = context.trainer_job(checkpoint.first_version)
    actors = launch(config, job, tasks, pool.placement)
    try:
        with WAITS.on("dreaming's actors", what="their start", kind="start"):
            actors.start(checkpoint, engines)
        pipeline = build_pipeline(context, actors, engines, tasks, checkpoint, on_restart)
        WAITS.take_idle()
        pipeline.run(on_step)
        idle = WAITS.take_idle()
        output = str((run_dir / "dreaming").resolve())
        pool.record_update(actors.learners.call("finish", output=output)[0])
    finally:
        actors.kill()
    return {
        "dreams": pipeline.store.counts.learned * config.dreaming.group_size,
        "idle": idle,
        "samples": _samples(run_dir, context.chat),
    }


def _samples(run_dir: Path, chat: ChatFormatter, count: int = 8) -> list[dict[str, str]]:
    """Describe the best and the worst dreams; of the others only the rewards are read."""
    lake = Lake(run_dir / "lake")
    dreams = lake.read(TRAJECTORIES, ["purpose", "reward"]).filter(
        (pc.field("purpose") == "dream") & pc.field("reward").is_valid()
    )
    uids = dreams.sort_by([("reward", "descending")]).column("uid").to_pylist()
    if len(uids) > count:
        uids = uids[: count // 2] + uids[-count // 2 :]
    chosen = from_batch(lake.pick(TRAJECTORIES, uids))
    return [
        {
            "title": f"Dream about {d.task_id.replace('-', ' ')}",
            "prompt": chat.decode(d.prompt_ids),
            "text": chat.decode(d.response_ids),
            "note": f"reward {d.reward:+.3f}",
        }
        for d in chosen
    ]
