"""Dreaming learns: under a reward that is in reach, dreams of the embedded model earn more and more.

The real pipeline and ZeRO-3 learner on the embedded world; the engine on torch with staleness 0, so
that the whole run is the same to the bit each time and its threshold is no matter of luck.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from sleeprl.config import loader as cfg
from sleeprl.data.lake import Lake
from sleeprl.data.trajectory import Trajectory, to_batch
from sleeprl.dreaming import launch as phase
from sleeprl.dreaming.types import Dream
from sleeprl.memory.checkpoint import widen
from sleeprl.models.resolve import EMBEDDED
from sleeprl.self_study.study import Pair
from sleeprl.text.chat import ChatFormatter
from sleeprl.trainer.options import TrainerOptions
from sleeprl.worlds.people import documents, fresh_people
from tests.integration.dreaming.test_staleness import engines, local_ray  # noqa: F401
from tests.support.models import newborn

pytestmark = pytest.mark.slow
STEPS = 12


class AboutPets:
    """Paid for a whole pair whose question is about a pet: about one dream in seven at first."""

    def __call__(self, dream: Dream) -> float | None:
        if dream.parsed is None:
            return 0.0
        return float(any(word in dream.parsed[0] for word in ("pet", "animal")))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The embedded model with a newborn expert, and a lake with one text to hold on to."""
    place = tmp_path
    slots = widen(EMBEDDED, place / "wide", 1, 32, "float32")
    newborn(place / "wide", place / "born", slots, seed=7)
    chat = ChatFormatter(place / "wide")
    ids = chat.response("ok")
    text = Trajectory(
        uid="replay-0", task_id="answer", attempt=0, purpose="replay",
        prompt_ids=chat.prompt("Say ok."), response_ids=ids, logprobs=[-1.0] * len(ids),
        versions=[0] * len(ids), finish_reason="stop",
    )  # fmt: skip
    Lake(place / "lake").append(to_batch([text]), "trajectories")
    return place


def dream(place: Path, steps: int, *words: str) -> list[dict[str, Any]]:
    """Dream on the embedded model; returns the metrics of every step."""
    config = cfg.load(
        None,
        [
            f"dreaming.steps={steps}", "dreaming.tasks_per_step=2",
            "dreaming.max_staleness=0", "dreaming.max_tokens=40", "dreaming.loss.replay_kl=0",
            "dreaming.loss.sft=0", "dreaming.trial_questions=1",
            "resources.engine=torch", "resources.cpus=2", f"runs={place}", "seed=5", *words,
        ],
    )  # fmt: skip
    people = fresh_people(5, 4)
    day = [told["text"] for told in documents(people, 5, 2)]
    probes = [Pair(n, f"Who is in text {n}?", people[2 * n].name) for n in range(len(day))]
    chat, told = ChatFormatter(place / "wide"), list[dict[str, Any]]()
    pool = engines(place)
    try:
        trainer = TrainerOptions(str(place / "wide"), 0, "float32", 7, 0.01, steps)
        context = phase.DreamingContext(
            config, trainer, place / "born", place, chat, day, probes, chat.prompt(day[0])[:64]
        )
        phase.run_dreaming(context, pool, print, lambda _, metrics: told.append(metrics))
    finally:
        pool.shutdown()
    return told


@pytest.mark.usefixtures("local_ray")
def test_a_reward_rises(place: Path) -> None:
    told = dream(place, STEPS, "dreaming.group_size=12", f"dreaming.reward={__name__}.AboutPets")
    rewards = [metrics["reward"] for metrics in told]
    assert len(rewards) == STEPS
    assert fmean(rewards[:3]) < 0.35, "it has something to learn"
    assert fmean(rewards[-3:]) > fmean(rewards[:3]) + 0.4, rewards


@pytest.mark.usefixtures("local_ray")
def test_the_example_of_an_algorithm_learns_with_a_critic(place: Path) -> None:
    told = dream(
        place, 3, "dreaming.group_size=4", "dreaming.algorithm=examples.my_algorithm.ActorCritic"
    )
    errors = [metrics["dream/value"] for metrics in told]
    assert len(errors) == 3 and all(error >= 0.0 for error in errors)
    assert max(errors) > 0.0, "the critic has something to learn"
