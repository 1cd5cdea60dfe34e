"""Brings the actors of dreaming up, runs the pipeline, and takes them down."""

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
from sleeprl.dreaming.messages import PublishResult
from sleeprl.dreaming.pipeline import OnStep, Pipeline
from sleeprl.dreaming.recovery import RecoveryManager, start_ranks
from sleeprl.dreaming.reward_actor import RewardActor
from sleeprl.dreaming.scorer import LearningGainScorer
from sleeprl.dreaming.trainer_actor import DreamTrainer, DreamTrainerJob
from sleeprl.dreaming.types import Task, algorithm_of
from sleeprl.rollout.engine import EngineOptions, spawn_engine
from sleeprl.rollout.engine_pool import EnginePool
from sleeprl.self_study.sampler import build_qa_prompt
from sleeprl.self_study.study import Pair
from sleeprl.text.chat import ChatFormatter
from sleeprl.text.prompts import STUDY_QA, with_experience
from sleeprl.trainer.options import TrainerOptions
from sleeprl.trainer.setup import warm_up


def make_tasks(documents: Sequence[str], probes: Sequence[Pair], seed: int) -> list[Task]:
    """One task per document that has probes, its probes shuffled.

    Raises ConfigError where none has: there is nothing to judge dreams on.
    """
    tasks = []
    for number, document in enumerate(documents):
        mine = [(p.question, p.answer) for p in probes if p.document == number]
        random.Random(f"{seed}-probes-{number}").shuffle(mine)
        if mine:
            message = with_experience(document, STUDY_QA)
            tasks.append(Task(f"document-{number}", number, message, tuple(mine)))
    if not tasks:
        raise ConfigError(
            "dreaming.enabled=true, but self-study left no document with probes to judge dreams on; raise "
            "self_study.held_out_share or pairs_per_document, or set dreaming.enabled=false"
        )
    return tasks


@dataclass(frozen=True)
class Actors:
    """All of a phase but the engines. new_engine, new_learner: start one more, by its index."""

    learners: ActorGroup
    scorers: ActorGroup
    rewards: ActorGroup
    curriculum: ActorGroup
    new_engine: Callable[[int], Any]
    new_learner: Callable[[int], Any]

    def start(self, position: DreamingCheckpoint, engines: ActorGroup) -> None:
        """Go on from a position; engines and scorers then have the learner's weights, and those
        engines work that are verified to have them."""
        self.curriculum.call("ping")
        self.rewards.call("ping")
        if position.curriculum_state is not None:
            self.curriculum.call("load_state_dict", state=position.curriculum_state)
        start_ranks(self.learners, position)
        first: PublishResult = self.learners.call("publish", engines=engines.actors)[0]
        self.scorers.call("set_expert", expert=first.expert)
        engines.updated(first.verified)

    @property
    def groups(self) -> tuple[ActorGroup, ...]:
        return self.learners, self.scorers, self.rewards, self.curriculum

    def kill(self) -> None:
        for group in self.groups:
            group.kill()


def learner_job(
    config: NightConfig,
    learner: TrainerOptions,
    expert: Path,
    run_dir: Path,
    canary: list[int],
    first_version: int,
) -> DreamTrainerJob:
    return DreamTrainerJob(
        learner=learner,
        config=config.dreaming,
        expert=str(expert.resolve()),
        lake=str((run_dir / "lake").resolve()),
        seed=config.seed,
        beta=config.consolidation.beta,
        top_k=config.consolidation.top_k,
        canary=canary,
        first_version=first_version,
        stall_seconds=config.resources.stall_seconds,
    )


def spawn_unreserved(actor: Any, *arguments: Any, count: int = 1, gpus: float = 0.0) -> list[Any]:
    """Some that work in the gaps of the others, so they reserve no core."""
    return [WARM.spawn(actor, *arguments, gpus=gpus) for _ in range(count)]


def prestart_actors(config: NightConfig, learner: TrainerOptions) -> None:
    """Start processes for the actors of dreaming, in the background: they import and wait.

    Only where Ray is this machine's own, and only processes without a GPU: elsewhere they would take
    room from others for as long as they wait.

    Args:
        config: Settings of the night.
        learner: Options of the trainer to come.
    """
    resources = config.resources
    if resources.address is not None:
        return
    if not resources.learner_gpus:
        WARM.prestart(DreamTrainer, resources.learner_workers, partial(warm_up, learner))
    if not resources.scorer_gpus:
        load = partial(LearningGainScorer, *_scorer_arguments(config, learner))
        WARM.prestart(LearningGainScorer, resources.scorers, load)
    WARM.prestart(RewardActor, resources.reward_workers, partial(ChatFormatter, learner.checkpoint))
    WARM.prestart(CurriculumActor, 1, dict)


def _scorer_arguments(config: NightConfig, learner: TrainerOptions) -> tuple[Any, ...]:
    """Arguments of the scorer of a trainer with these options."""
    dreaming = config.dreaming
    return (
        learner.checkpoint, learner.seed, dreaming.trial_learning_rate,
        dreaming.trial_questions, 1, learner.teacher_only_slots, learner.wake_gradients_path,
        bool(config.resources.scorer_gpus),
    )  # fmt: skip


def spawn_scorers_and_rewards(
    config: NightConfig, learner: TrainerOptions
) -> tuple[ActorGroup, ActorGroup]:
    """The scorers and the rewards."""
    dreaming, resources = config.dreaming, config.resources
    scorers = spawn_unreserved(
        LearningGainScorer, *_scorer_arguments(config, learner),
        count=resources.scorers, gpus=resources.scorer_gpus,
    )  # fmt: skip
    rewards = spawn_unreserved(
        RewardActor, learner.checkpoint, dreaming.reward, dreaming.reward_options,
        dreaming.reward_timeout_s, algorithm_of(dreaming), dreaming.max_tokens,
        count=resources.reward_workers,
    )  # fmt: skip
    return ActorGroup("scorer", scorers), ActorGroup("reward", rewards)


def launch(
    config: NightConfig,
    job: DreamTrainerJob,
    tasks: Sequence[Task],
    placement: Any = None,
) -> Actors:
    """placement: of the pool; a restarted engine takes its place there."""
    dreaming, resources, learner = config.dreaming, config.resources, job.learner
    world = resources.learner_workers
    options = EngineOptions.from_config(config, learner.checkpoint, learner.dtype)

    def new_learner(rank: int) -> Any:
        # The processes of consolidation may hold the cores, and wait.
        cpus = 0 if processes_may_wait(resources) else resources.learner_cpus
        return WARM.spawn(DreamTrainer, job, rank, world, cpus=cpus, gpus=resources.learner_gpus)

    curriculum = spawn_unreserved(
        CurriculumActor, dreaming.curriculum, dreaming.curriculum_options, tasks, config.seed
    )
    return Actors(
        ActorGroup("learner", [new_learner(rank) for rank in range(world)]),
        *spawn_scorers_and_rewards(config, learner),
        ActorGroup("curriculum", curriculum),
        partial(
            spawn_engine,
            options=options,
            cpus=resources.engine_cpus,
            gpus=resources.engine_gpus,
            engine=resources.engine,
            placement=placement,
        ),
        new_learner,
    )


def assemble(
    config: NightConfig,
    actors: Actors,
    engines: ActorGroup,
    tasks: Sequence[Task],
    chat: ChatFormatter,
    position: DreamingCheckpoint,
    on_restart: Callable[[str], None],
) -> Pipeline:
    """The pipeline over these actors, which goes on from a position."""
    rounds = algorithm_of(config.dreaming).max_resample_rounds
    return Pipeline(
        config=config.dreaming,
        tasks={task.id: task for task in tasks},
        engines=engines,
        scorers=actors.scorers,
        rewards=actors.rewards,
        curriculum=actors.curriculum,
        learner=actors.learners,
        build_prompt=lambda message: build_qa_prompt(chat, config.self_study, message),
        seed=config.seed,
        queue=AdmissionQueue(
            position,
            config.dreaming.tasks_per_step,
            config.dreaming.max_staleness,
            rounds * config.dreaming.tasks_per_step,
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
    """Return how many groups admission may have under way, on one engine at the most."""
    return (dreaming.max_staleness + 2) * dreaming.tasks_per_step


def run_dreaming(
    config: NightConfig,
    pool: EnginePool,
    learner: TrainerOptions,
    expert: Path,
    chat: ChatFormatter,
    documents: Sequence[str],
    probes: Sequence[Pair],
    run_dir: Path,
    canary: list[int],
    on_restart: Callable[[str], None],
    on_step: OnStep,
) -> dict[str, Any]:
    """Dream for ``dreaming.steps`` updates; the expert is in ``run_dir/dreaming`` at the end.

    expert: directory of the one that consolidation left, from which dreaming goes on.
    """
    dreaming = config.dreaming
    tasks = make_tasks(documents, probes, config.seed)
    position = DreamingCheckpoint.load((run_dir / "dreaming-state").resolve(), pool.version + 1)
    job = learner_job(config, learner, expert, run_dir, canary, position.first_version)
    engines = pool.lease(max_groups_in_flight(dreaming))
    actors = launch(config, job, tasks, pool.placement)
    try:
        with WAITS.on("dreaming's actors", what="their start", kind="start"):
            actors.start(position, engines)
        pipeline = assemble(config, actors, engines, tasks, chat, position, on_restart)
        WAITS.take_idle()
        pipeline.run(on_step)
        idle = WAITS.take_idle()
        last = actors.learners.call("finish", output=str((run_dir / "dreaming").resolve()))[0]
        pool.record_update(last)
    finally:
        actors.kill()
    return {
        "dreams": pipeline.store.counts.learned * dreaming.group_size,
        "idle": idle,
        "samples": _samples(run_dir, chat),
    }


def _samples(run_dir: Path, chat: ChatFormatter, count: int = 8) -> list[dict[str, str]]:
    """The best and the worst dreams, for the report. Of the others only the rewards are read."""
    lake, kind = Lake(run_dir / "lake"), TRAJECTORIES
    dreams = lake.read(kind, ["purpose", "reward"]).filter(
        (pc.field("purpose") == "dream") & pc.field("reward").is_valid()
    )
    uids = dreams.sort_by([("reward", "descending")]).column("uid").to_pylist()
    if len(uids) > count:
        uids = uids[: count // 2] + uids[-count // 2 :]
    chosen = from_batch(lake.pick(kind, uids))
    return [
        {
            "title": f"Dream about {d.task_id.replace('-', ' ')}",
            "prompt": chat.decode(d.prompt_ids),
            "text": chat.decode(d.response_ids),
            "note": f"reward {d.reward:+.3f}",
        }
        for d in chosen
    ]
