"""Brings the actors of dreaming up, runs the pipeline, and takes them down."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from sleeprl.actors.fleet import Fleet
from sleeprl.actors.group import ActorGroup, Served
from sleeprl.actors.learner import LearnerOptions
from sleeprl.chat import Chat
from sleeprl.config import NightConfig
from sleeprl.consolidation.self_study import Pair
from sleeprl.dreaming.curricula import BUILTIN
from sleeprl.dreaming.learning import LearnerActor, LearnerJob
from sleeprl.dreaming.pipeline import OnStep, Pipeline, fleet_group
from sleeprl.dreaming.rewards import RewardActor
from sleeprl.dreaming.tasks import Curriculum, Outcome, Task
from sleeprl.dreaming.trials import Scorer
from sleeprl.prompts import STUDY_QA, with_experience
from sleeprl.registry import create
from sleeprl.trajectories.lake import Lake
from sleeprl.trajectories.schema import from_batch


class CurriculumActor(Served):
    """A curriculum in a process of its own, so that a user's code cannot stall the loop."""

    def __init__(
        self, name: str, options: dict[str, Any], tasks: Sequence[Task], seed: int
    ) -> None:
        self.curriculum: Curriculum = create(
            name, "curriculum", BUILTIN, {**options, "tasks": list(tasks), "seed": seed}
        )

    def next(self, n: int) -> list[Task]:
        return self.curriculum.next(n)

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        self.curriculum.observe(outcomes)


def make_tasks(documents: Sequence[str], probes: Sequence[Pair], seed: int) -> list[Task]:
    """One task per document that has probes, its probes shuffled."""
    tasks = []
    for number, document in enumerate(documents):
        mine = [(p.question, p.answer) for p in probes if p.document == number]
        random.Random(f"{seed}-probes-{number}").shuffle(mine)
        if mine:
            message = with_experience(document, STUDY_QA)
            tasks.append(Task(f"document-{number}", number, message, tuple(mine)))
    return tasks


def run(
    config: NightConfig,
    fleet: Fleet,
    learner: LearnerOptions,
    expert: Path,
    chat: Chat,
    documents: Sequence[str],
    probes: Sequence[Pair],
    run_dir: Path,
    canary: list[int],
    on_step: OnStep,
) -> dict[str, Any]:
    """Dream for ``dreaming.steps`` updates; the expert is in ``run_dir/dreaming`` at the end.

    expert: directory of the one that consolidation left, from which dreaming goes on.
    """
    dreaming, resources = config.dreaming, config.resources
    tasks = make_tasks(documents, probes, config.seed)
    if not tasks:
        raise ValueError("no document has probes to judge dreams on; raise self_study.probe_share")
    job = LearnerJob(
        learner=learner,
        config=dreaming,
        expert=str(expert.resolve()),
        lake=str((run_dir / "lake").resolve()),
        seed=config.seed,
        beta=config.consolidation.beta,
        top_k=config.consolidation.top_k,
        canary=canary,
        first_version=fleet.version + 1,
    )
    world = resources.learner_workers
    learner_actor = ray.remote(LearnerActor).options(
        num_cpus=resources.learner_cpus, num_gpus=resources.learner_gpus
    )
    engines = fleet.group.actors
    # Scorer, reward and curriculum work in the gaps of the others, so they reserve no core.
    beside = {"num_cpus": 0}
    learners = ActorGroup(
        "learner", [learner_actor.remote(job, r, world, engines) for r in range(world)]
    )
    scorers = ActorGroup(
        "scorer",
        [
            ray.remote(Scorer)
            .options(**beside)
            .remote(
                learner.checkpoint,
                learner.seed,
                learner.dtype,
                dreaming.trial_learning_rate,
                dreaming.trial_probes,
                1,
                learner.held,
            )
        ],
    )
    rewards = ActorGroup(
        "reward",
        [
            ray.remote(RewardActor)
            .options(**beside)
            .remote(
                learner.checkpoint,
                dreaming.reward,
                dreaming.reward_options,
                dreaming.reward_deadline,
            )
        ],
    )
    curriculum = ActorGroup(
        "curriculum",
        [
            ray.remote(CurriculumActor)
            .options(**beside)
            .remote(dreaming.curriculum, dreaming.curriculum_options, tasks, config.seed)
        ],
    )
    try:
        curriculum.call("ping")
        rewards.call("ping")
        address = learners.scatter("rendezvous", [{}] * world)[0]
        learners.call("start", address=address)
        first = learners.call("publish")[0]
        scorers.call("set_expert", expert=ray.get(first["expert"]))
        pipeline = Pipeline(
            config=dreaming,
            tasks={task.id: task for task in tasks},
            engines=fleet_group(fleet, (dreaming.staleness + 2) * dreaming.tasks_per_step),
            scorers=scorers,
            rewards=rewards,
            curriculum=curriculum,
            learner=learners,
            chat=chat,
            seed=config.seed,
        )
        pipeline.run(on_step)
        last = learners.call("finish", output=str((run_dir / "dreaming").resolve()))[0]
        fleet.version = last["version"]
    finally:
        for group in (learners, scorers, rewards, curriculum):
            group.kill()
    return {
        "dreams": pipeline.counts.learned * dreaming.group_size,
        "idle": pipeline.idle,
        "samples": _samples(run_dir, chat),
    }


def _samples(run_dir: Path, chat: Chat, count: int = 8) -> list[dict[str, str]]:
    """The best and the worst dreams, for the report."""
    dreams = [
        t for t in from_batch(Lake(run_dir / "lake").read("trajectories")) if t.purpose == "dream"
    ]
    scored = sorted((d for d in dreams if d.reward is not None), key=lambda d: -(d.reward or 0.0))
    chosen = scored[: count // 2] + scored[-count // 2 :] if len(scored) >= count else scored
    return [
        {
            "title": f"Dream about {d.task_id.replace('-', ' ')}",
            "prompt": chat.decode(d.prompt_ids),
            "text": chat.decode(d.response_ids),
            "note": f"reward {d.reward:+.3f}",
        }
        for d in chosen
    ]
