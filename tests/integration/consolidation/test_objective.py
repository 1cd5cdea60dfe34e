"""What ``consolidation`` says of the objective, and where it arrives: weights, rewards, targets."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sleeprl.algorithms.base import RewardBatch
from sleeprl.config import loader as cfg
from sleeprl.config.methods import METHODS, NEW, REPLAY, STUDENT
from sleeprl.config.schema import ConfigError, ConsolidationConfig
from sleeprl.config.validation import validate_plugins
from sleeprl.consolidation import student_rollouts
from sleeprl.consolidation.methods import loss_weights
from sleeprl.data.trajectory import Trajectory
from sleeprl.losses.combined import combined_loss, token_counts
from sleeprl.losses.divergence import divergence
from sleeprl.losses.types import LossBatch, LossOptions, LossWeights
from sleeprl.memory.checkpoint import widen
from sleeprl.plugins import PluginError, create
from sleeprl.rollout.types import Completion
from sleeprl.trainer.batching import TrainingExample
from sleeprl.trainer.trainer import Trainer
from tests.support.models import make_tiny_model
from tests.support.ranks import PARTS, SLOTS, Notes, launch, options, rows

# --- weights by step ----------------------------------------------------------------


def test_seed_then_imitate_and_a_rising_lambda() -> None:
    config = ConsolidationConfig(
        distillation=0.6, on_policy=0.2, on_policy_warmup=10, seed_steps=4, ce=0.5, replay_ratio=3.0
    )
    method = METHODS["seeding"]
    for step, alpha, share in ((0, 1.0, 0.2), (3, 1.0, 0.44), (4, 0.6, 0.52), (40, 0.6, 1.0)):
        parts = loss_weights(method, config, step)
        taught = alpha * (1 - share)
        assert parts[NEW].kl == pytest.approx(taught) and parts[NEW].ce == 0.5
        assert parts[REPLAY].kl == pytest.approx(3 * taught) and parts[REPLAY].ce == 1.5
        assert parts[STUDENT].kl == pytest.approx(alpha * share)
        assert parts[STUDENT].pg == pytest.approx(1 - alpha)


# --- rewards ------------------------------------------------------------------------


class Letters:
    """A tokenizer of letters."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


def source(text: str) -> Trajectory:
    return Trajectory(
        uid=text, task_id="answer", attempt=0, purpose="self_study", prompt_ids=[1],
        response_ids=list(map(ord, text)), logprobs=[-1.0] * len(text), versions=[0] * len(text),
        finish_reason="stop", teacher_prompt_ids=[2, 3],
    )  # fmt: skip


def rolled_out(
    config: ConsolidationConfig, *groups: Sequence[str]
) -> tuple[list[TrainingExample], Any]:
    """Rows for these answers to the teacher's ``abcd``, group by group."""
    drawn = [
        student_rollouts.Continuation(source("abcd"), [], list(map(ord, "abcd"))) for _ in groups
    ]
    said = [
        Completion(list(map(ord, text)), [-1.0] * len(text), [0] * len(text), "stop")
        for group in groups
        for text in group
    ]
    chat: Any = Letters()
    loss = LossOptions(algorithm=create(config.algorithm, "algorithm", {}), max_response_tokens=12)
    judge = lambda pairs: [a == b for a, b in pairs]  # noqa: E731
    return student_rollouts.score_rollouts(drawn, said, config, chat, judge, loss)[:2]


@pytest.mark.parametrize("name", ["dapo_unscaled", "grpo", "rloo", "reinforce"])
def test_the_algorithm_gives_the_advantages(name: str) -> None:
    config = ConsolidationConfig(group_size=2, semantic=0.5, algorithm=name, edit_threshold=0.5)
    made, told = rolled_out(config, ("abcd", "abxx"), ("ab", "ab"))
    # Half for the same words, half for 1 - edits/4 where no more than two.
    rewards = [1.0, 0.25, 0.25, 0.25]
    assert told["imitation_reward"] == pytest.approx(sum(rewards) / 4)
    scores = RewardBatch(rewards, ["0", "0", "1", "1"], [4, 4, 2, 2], 12)
    expected = create(name, "algorithm", {}).advantages(scores)
    assert [row.advantage for row in made] == pytest.approx(expected)
    assert (made[2].advantage is None) == (name == "dapo_unscaled"), "passes over equal rewards"
    assert {row.part for row in made} == {STUDENT}
    assert made[0].teacher_prompt_ids == [2, 3] and made[0].rollout_logprobs == [-1.0] * 4


def test_the_reward_is_the_configured_one() -> None:
    def reward(text: str, **settings: Any) -> float:
        config = ConsolidationConfig(group_size=1, **settings)
        return float(rolled_out(config, (text,))[1]["imitation_reward"])

    assert reward("abxx", semantic=0.0, edit_threshold=0.25) == 0.0
    assert reward("abxx", semantic=0.0, edit_mode="abs", edit_threshold=1.0) == 0.0
    assert reward("abxx", semantic=0.0, edit_mode="abs", edit_threshold=2.0) == 0.5
    assert reward("abcd", semantic=1.0) == 1.0 and reward("abcx", semantic=1.0) == 0.0


def test_a_judge_is_not_asked_what_does_not_count() -> None:
    def never(_: Any) -> list[float]:
        raise AssertionError("asked")

    chat: Any = Letters()
    drawn = [student_rollouts.Continuation(source("ab"), [], [97, 98])]
    said = [Completion([97], [-1.0], [0], "stop")]
    config = ConsolidationConfig(group_size=1, semantic=0.0)
    assert student_rollouts.score_rollouts(drawn, said, config, chat, never, LossOptions())[0]


# --- rows without an advantage --------------------------------------------------------


def test_a_row_without_an_advantage_is_not_a_zero_to_average_with() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 7, dtype=torch.float64, requires_grad=True)
    parts = {"student": LossWeights(pg=1.0, kl=0.5)}

    def loss(of: list[int], advantages: list[float | None]) -> tuple[Tensor, dict[str, float]]:
        window = LossBatch(
            tokens_BR=torch.tensor([[1, 2], [3, 4], [5, 6]])[of],
            mask_BR=torch.ones(len(of), 2),
            part=["student"] * len(of),
            advantages_BR=torch.tensor([[math.nan if a is None else a] for a in advantages]),
            rollout_logprobs_BR=torch.full((len(of), 2), -2.0, dtype=torch.float64),
            teacher_logits_BRV=torch.ones(len(of), 2, 7, dtype=torch.float64),
        )
        counts = token_counts(parts, window.part, [2] * len(of), advantages)
        return combined_loss(logits[of], window, parts, counts, LossOptions(support="full"))

    whole, seen = loss([0, 1, 2], [1.0, None, -0.5])
    (slope,) = torch.autograd.grad(whole, logits)
    _, two = loss([0, 2], [1.0, -0.5])
    assert seen["student/pg"] == pytest.approx(two["student/pg"])
    assert whole.isfinite() and slope.isfinite().all() and slope[1].abs().sum() > 0
    (silent,) = torch.autograd.grad(loss([0, 1, 2], [None] * 3)[0], logits)
    assert silent.isfinite().all() and "student/pg" not in loss([1], [None])[1]


# --- the teacher's targets --------------------------------------------------------------

SUPPORTS = {
    name: LossOptions(beta=0.3, top_k=6, support=name, pointwise_clip=clip)
    for name, clip in (("teacher", None), ("student", 0.05), ("full", None))
}


def compare(directory: Path, notes: Notes) -> None:
    """The divergence of one step on each support, for a model that grows and one in full."""
    parts = {name: replace(part, pg=0.0, kl=1.0) for name, part in PARTS.items()}
    for slot in (1, None):
        for name, loss in SUPPORTS.items():
            learner = Trainer(options(directory, slot=slot))
            learner.step(rows(2), parts, loss)
            notes.tensors(f"{slot}-{name}", dict(learner.export()))
            notes.numbers[slot, name] = learner.step(rows(1), parts, loss)


def test_the_learner_s_divergence_is_that_of_the_whole_logits(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "plain", seed=4)
    widen(tmp_path / "plain", tmp_path / "wide", SLOTS.count, SLOTS.width, "float32")
    (notes,) = launch(1, tmp_path, [compare])
    assert notes.errors == {}
    from safetensors.torch import load_file

    before = AutoModelForCausalLM.from_pretrained(tmp_path / "wide").eval()
    for slot in (1, None):
        for name, loss in SUPPORTS.items():
            after = AutoModelForCausalLM.from_pretrained(tmp_path / "wide").eval()
            after.load_state_dict(load_file(tmp_path / f"{slot}-{name}.safetensors"), strict=False)
            for part in PARTS:
                mine = [row for row in rows(1) if row.part == part]
                total = sum(divergence_of(row, before, after, loss) for row in mine)
                tokens = sum(len(row.response_ids) for row in mine)
                found = notes.numbers[slot, name][f"{part}/kl"]
                assert found == pytest.approx(total / tokens, abs=2e-4), (slot, name, part)
    values = [notes.numbers[1, name]["new/kl"] for name in SUPPORTS]
    assert len({round(value, 4) for value in values}) == 3


def remember(directory: Path, notes: Notes) -> None:
    """What is remembered of the teacher goes through a checkpoint, once and again."""
    named = [replace(row, key=f"a:{number}") for number, row in enumerate(rows(1))]
    learner, other = (Trainer(options(directory)) for _ in range(2))
    for loss in (SUPPORTS["teacher"], SUPPORTS["full"]):
        learner.step(named, PARTS, loss)
    kept = learner.smaller_self.cache.state_dict()
    for _ in range(2):  # the files of two ranks that met the same texts
        other.smaller_self.cache.load_state_dict(
            {name: tensor.clone() for name, tensor in kept.items()}
        )
    again = other.smaller_self.cache.state_dict()
    assert kept.keys() == again.keys() and len(kept) == 3 * len(named)
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    other.step(named, PARTS, SUPPORTS["teacher"])


def test_what_the_teacher_said_goes_through_a_checkpoint(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "plain", seed=4)
    widen(tmp_path / "plain", tmp_path / "wide", SLOTS.count, SLOTS.width, "float32")
    (notes,) = launch(1, tmp_path, [remember])
    assert notes.errors == {}


@torch.no_grad()
def divergence_of(row: TrainingExample, teacher: Any, student: Any, loss: LossOptions) -> float:
    def said(model: Any, prompt: list[int]) -> Tensor:
        ids = torch.tensor([prompt + row.response_ids])
        return model(input_ids=ids).logits[0, len(prompt) - 1 : -1]

    return float(
        divergence(
            said(teacher, row.teacher_prompt),
            said(student, row.prompt_ids),
            beta=loss.beta,
            support=loss.support,
            k=loss.top_k,
            clip=loss.pointwise_clip,
        ).sum()
    )


# --- what is refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("consolidation.support=both", "teacher, student, full"),
        ("consolidation.algorithm=ppo", "needs a critic"),
        ("consolidation.edit_threshold=3", "consolidation.edit_mode=abs"),
        ("consolidation.pointwise_clip=0", "greater than 0"),
        ("consolidation.seed_steps=-1", "at least 0"),
    ],
)
def test_a_setting_that_cannot_work_is_told(word: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        cfg.load(None, [word])
    cfg.load(None, ["consolidation.edit_mode=abs", "consolidation.edit_threshold=3"])


def test_a_plug_in_that_is_not_there_is_told_before_the_night() -> None:
    for word, near in (
        ("dreaming.reward=likelihod_gain", "likelihood_gain"),
        ("dreaming.curriculum=uniforn", "uniform"),
        ("consolidation.judge=teachr", "teacher"),
        ("consolidation.judge=no.such.Judge", "cannot be imported"),
    ):
        with pytest.raises(PluginError, match=near):
            validate_plugins(cfg.load(None, [word]))
    validate_plugins(cfg.load())


def test_the_draw_of_roll_outs_is_by_seed() -> None:
    config = ConsolidationConfig()
    texts = [source("abcdefgh"), source("hgfedcba")]
    first, second = (student_rollouts.draw(texts, 5, config, random.Random(1)) for _ in range(2))
    assert first == second
