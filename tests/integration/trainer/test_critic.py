"""PPO's critic in the real learner: it learns what texts are worth and leaves the policy alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sleeprl.algorithms.ppo import PPO
from sleeprl.losses.off_policy import ImportanceWeight
from sleeprl.losses.types import LossOptions, LossWeights
from sleeprl.memory.checkpoint import widen
from sleeprl.trainer.batching import TrainingExample
from sleeprl.trainer.trainer import Trainer
from tests.support.models import make_tiny_model
from tests.support.ranks import Notes, launch, options, rows

STEPS = 25
# Only the critic learns: the policy's advantages are all 0.
LOSS = LossOptions(
    algorithm=PPO(value_clip=10.0, value_weight=1.0), importance_weight=ImportanceWeight("off")
)
PARTS = {"student": LossWeights(pg=1.0), "new": LossWeights()}


def texts() -> list[TrainingExample]:
    """Some texts, and between them rows of another part, on which the critic has no say."""
    drawn = [row for row in rows(1) if row.part in PARTS]
    assert {row.part for row in drawn} == set(PARTS)
    return drawn


def judged(learner: Trainer, worth: float) -> list[TrainingExample]:
    batch = texts()
    return [
        replace(
            row,
            advantage=[0.0] * len(row.response_ids) if row.part == "student" else None,
            values=values,
            returns=[worth] * len(row.response_ids),
        )
        for row, values in zip(batch, learner.values(batch), strict=True)
    ]


def learn_worth(directory: Path, notes: Notes) -> None:
    learner = Trainer(options(directory, critic=True, learning_rate=0.05, weight_decay=0.0))
    born = learner.gather_expert()
    notes.numbers["at birth"] = learner.values(texts())
    told = [learner.step(judged(learner, 2.0), PARTS, LOSS) for _ in range(STEPS)]
    notes.numbers["told"] = told
    notes.numbers["learnt"] = learner.values(texts())
    notes.numbers["lengths"] = [len(row.response_ids) for row in texts()]
    notes.numbers["policy moved"] = max(
        float((a - b).abs().max())
        for a, b in zip(learner.gather_expert().values(), born.values(), strict=True)
    )
    notes.numbers["exported"] = sorted(name for name, _ in learner.export())
    state = learner.state_dict()
    notes.numbers["critic in the state"] = [n for n in state if n.endswith("critic.weight")]
    again = Trainer(options(directory, critic=True, learning_rate=0.05, weight_decay=0.0))
    again.load_state_dict(state)
    notes.numbers["resumed"] = again.values(texts())
    again.set_expert(born)
    plain = Trainer(options(directory))
    notes.numbers["plain export"] = sorted(name for name, _ in plain.export())


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Notes, Notes]:
    place = tmp_path_factory.mktemp("critic")
    make_tiny_model(place / "plain", seed=3)
    widen(place / "plain", place / "wide", 3, 8, "float32")
    (one,) = launch(1, place, [learn_worth])
    two, _ = launch(2, place, [learn_worth])
    assert one.errors == two.errors == {}
    return one, two


def test_the_critic_learns_what_texts_are_worth(seen: tuple[Notes, Notes]) -> None:
    numbers = seen[0].numbers
    assert all(v == 0.0 for row in numbers["at birth"] for v in row)
    assert [len(row) for row in numbers["learnt"]] == numbers["lengths"]
    losses = [told["student/value"] for told in numbers["told"]]
    assert losses[0] == pytest.approx(0.5 * 2.0**2)
    assert losses[-1] < 0.2 * losses[0]
    assert "new/value" not in numbers["told"][0]


def test_the_policy_does_not_notice(seen: tuple[Notes, Notes]) -> None:
    numbers = seen[0].numbers
    assert numbers["policy moved"] == 0.0
    assert numbers["exported"] == numbers["plain export"]


def test_it_is_kept_with_the_learner_s_state(seen: tuple[Notes, Notes]) -> None:
    numbers = seen[0].numbers
    assert len(numbers["critic in the state"]) == 3  # itself and its two moments
    assert numbers["resumed"] == numbers["learnt"]


def test_two_ranks_learn_the_same(seen: tuple[Notes, Notes]) -> None:
    one, two = (torch.tensor([v for r in s.numbers["learnt"] for v in r]) for s in seen)
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)
