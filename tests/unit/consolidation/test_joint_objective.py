"""The judges, and the joint objective of divergence and imitation reward."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sleeprl.algorithms.dapo import DAPOUnscaled
from sleeprl.consolidation.imitation_reward import lexical
from sleeprl.consolidation.judges import same_by_embedding, same_by_verdict
from sleeprl.consolidation.objective import on_policy_share, seeding_weights
from sleeprl.losses.combined import combined_loss, token_counts
from sleeprl.losses.divergence import generalised_jsd
from sleeprl.losses.off_policy import ImportanceWeight
from sleeprl.losses.types import LossBatch, LossOptions, LossWeights

share = st.floats(0.0, 1.0)
rewards_of_a_batch = st.lists(st.one_of(st.none(), st.integers(0, 4)), min_size=1, max_size=12)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- invariant 5, and the judges --------------------------------------------------

ids = st.lists(st.integers(0, 5), max_size=12)


@given(ids, ids, st.integers(0, 12))
def test_absolute_threshold_is_the_papers_formula(a: list[int], b: list[int], z0: int) -> None:
    """Invariant 5 for z0_mode='abs' (test_lexical_reward has it for the ratio)."""
    reward = lexical(a, b, z0, "abs")
    assert 0.0 <= reward <= 1.0
    assert lexical(a, a, z0, "abs") == 1.0
    assert reward == lexical(b, a, z0, "abs")
    unbounded = lexical(a, b, 1.0)
    distance = round((1.0 - unbounded) * max(len(a), len(b)))
    assert reward == (unbounded if distance <= z0 else 0.0)


def test_thresholds_differ_on_long_texts() -> None:
    long = list(range(100)), [*range(96), -1, -2, -3, -4]  # 4 edits of 100
    short = [1, 2, 3, 4], [9, 9, 9, 9]  # 4 edits of 4
    assert lexical(*long, 3, "abs") == 0.0 and lexical(*long, 0.5, "ratio") == 0.96
    assert lexical(*long, 4, "abs") == 0.96
    assert lexical(*short, 4, "abs") == 0.0 and lexical(*short, 0.5, "ratio") == 0.0
    with pytest.raises(ValueError, match="z0_mode='share'"):
        lexical([], [], 0.5, "share")


def test_embedding_judge() -> None:
    teacher = torch.tensor([[3.0, 0.0]] * 5)
    student = torch.tensor([[0.1, 0.0], [4.0, 3.0], [4.0, 3.1], [-1.0, 0.0], [0.0, 0.0]])
    # Cosines 1, exactly 0.8, just below, -1, and a row that is nothing.
    assert same_by_embedding(student, teacher).tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert same_by_embedding(student, teacher, 0.79).tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"student_NE has shape \(5, 2\).*\(1, 2\)"):
        same_by_embedding(student, teacher[:1])


@settings(deadline=None)
@given(st.floats(1e-3, 0.999), st.floats(1e-3, 1.0))
def test_verdict_judge(p_yes: float, answered: float) -> None:
    """P(yes) among the two answers, whatever else the judge might have said."""
    yes, no = (math.log(p * answered) for p in (p_yes, 1 - p_yes))
    got = same_by_verdict(torch.tensor([yes], dtype=torch.float64), torch.tensor([no]).double())
    if abs(p_yes - 0.5) > 1e-6:
        assert got.item() == float(p_yes > 0.5)


# --- the joint objective ----------------------------------------------------------


def batch(seed: int) -> tuple[Tensor, Tensor, LossBatch, list[int]]:
    """Logits and teacher logits of teacher texts and of roll-outs, with lengths 4, 3, 2, 4."""
    lengths = [4, 3, 2, 4]
    logits, teacher = normal(seed, 4, 4, 6).requires_grad_(), normal(seed + 1, 4, 4, 6)
    tokens = torch.randint(0, 6, (4, 4), generator=torch.Generator().manual_seed(seed))
    now = logits.detach().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    window = LossBatch(
        tokens_BR=tokens,
        mask_BR=(torch.arange(4) < torch.tensor(lengths)[:, None]).double(),
        part=["texts", "rollouts", "rollouts", "texts"],
        advantages_BR=torch.tensor([0.0, 0.7, -0.3, 0.0], dtype=torch.float64)[:, None],
        rollout_logprobs_BR=now + 0.3 * normal(seed + 2, 4, 4),
        teacher_logits_BRV=teacher,
    )
    return logits, teacher, window, lengths


def joint(seed: int, beta: float, step: int = 0, **objective: float) -> tuple[float, Tensor]:
    """-J_KS of a batch and its gradient, by the streams."""
    logits, _, window, lengths = batch(seed)
    weights = seeding_weights(step, **objective)  # type: ignore[arg-type]
    parts = {"texts": weights.texts, "rollouts": weights.rollouts}
    counts = token_counts(parts, window.part, lengths)
    options = LossOptions(
        beta=beta,
        support="full",
        algorithm=DAPOUnscaled(),
        importance_weight=ImportanceWeight("off"),
    )
    loss, _ = combined_loss(logits, window, parts, counts, options)
    loss.backward()
    assert logits.grad is not None
    return loss.item(), logits.grad


def gkd(seed: int, beta: float, rows: list[int]) -> tuple[float, Tensor]:
    """GKD's loss: mean over the tokens of ``rows`` of the divergence from the teacher."""
    logits, teacher, _, lengths = batch(seed)
    tokens = [
        generalised_jsd(teacher[r, t].log_softmax(-1), logits[r, t].log_softmax(-1), beta)
        for r in rows
        for t in range(lengths[r])
    ]
    loss = torch.stack(tokens).mean()
    loss.backward()
    assert logits.grad is not None
    return loss.item(), logits.grad


def grpo(seed: int) -> tuple[float, Tensor]:
    """The policy-gradient term written out: clipped ratio to the behaviour, mean over tokens."""
    logits, _, window, lengths = batch(seed)
    tokens = []
    for r in (1, 2):
        for t in range(lengths[r]):
            logprob = logits[r, t].log_softmax(-1)[window.tokens_BR[r, t]]
            rho, advantage = (
                (logprob - window.rollout_logprobs_BR[r, t]).exp(),
                window.advantages_BR[r, 0],
            )
            tokens.append(-torch.minimum(rho * advantage, rho.clamp(0.8, 1.28) * advantage))
    loss = torch.stack(tokens).mean()
    loss.backward()
    assert logits.grad is not None
    return loss.item(), logits.grad


def same(found: tuple[float, Tensor], expected: tuple[float, Tensor]) -> None:
    assert found[0] == pytest.approx(expected[0], abs=1e-10)
    torch.testing.assert_close(found[1], expected[1], atol=1e-10, rtol=1e-8)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), share)
def test_invariant_6_the_ends_of_alpha(seed: int, beta: float) -> None:
    """alpha=1 is GKD's on-policy loss, alpha=0 is GRPO on r alone."""
    same(joint(seed, beta, alpha=1.0, on_policy=1.0), gkd(seed, beta, [1, 2]))
    same(joint(seed, beta, alpha=0.0, on_policy=1.0), grpo(seed))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), share)
def test_invariant_7_the_ends_of_lambda(seed: int, beta: float) -> None:
    """lambda=0 is distillation on teacher texts, lambda=1 on the student's own."""
    same(joint(seed, beta, alpha=1.0, on_policy=0.0), gkd(seed, beta, [0, 3]))
    same(joint(seed, beta, alpha=1.0, on_policy=1.0), gkd(seed, beta, [1, 2]))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), share, share, share)
def test_the_joint_objective_is_the_mixture(
    seed: int, beta: float, alpha: float, on_policy: float
) -> None:
    texts, rollouts, reward = gkd(seed, beta, [0, 3]), gkd(seed, beta, [1, 2]), grpo(seed)
    expected = [
        (1 - alpha) * reward[i] + alpha * (on_policy * rollouts[i] + (1 - on_policy) * texts[i])
        for i in (0, 1)
    ]
    same(joint(seed, beta, alpha=alpha, on_policy=on_policy), (expected[0], expected[1]))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.floats(1e-6, 1e-4))
def test_invariant_8_the_ends_of_beta(seed: int, small: float) -> None:
    """JSD(beta)/beta tends to the forward KL, JSD(beta)/(1-beta) near 1 to the reverse."""
    teacher, student = (0.5 * normal(seed + i, 4, 5).clamp(-3, 3) for i in (0, 1))
    t, s = teacher.log_softmax(-1), student.log_softmax(-1)
    forward, reverse = (t.exp() * (t - s)).sum(-1), (s.exp() * (s - t)).sum(-1)
    torch.testing.assert_close(generalised_jsd(t, s, 0.0), forward)
    torch.testing.assert_close(generalised_jsd(t, s, 1.0), reverse)
    for beta, kl in ((small, forward), (1 - small, reverse)):
        limit = generalised_jsd(t, s, beta) / small
        torch.testing.assert_close(limit, kl, atol=2e-3, rtol=2e-2)


# --- schedules --------------------------------------------------------------------


def test_on_policy_share_by_hand() -> None:
    assert [on_policy_share(step, 0.5) for step in (0, 7, 1000)] == [0.5] * 3
    warm = [on_policy_share(step, 0.5, 10) for step in (0, 1, 5, 10, 11)]
    assert warm == pytest.approx([0.5, 0.55, 0.75, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"start=1\.5"):
        on_policy_share(0, 1.5)


@given(share, st.integers(0, 50), st.integers(0, 100), st.integers(0, 20))
def test_on_policy_share_rises_from_start_to_one(
    start: float, warmup: int, step: int, more: int
) -> None:
    now, later = (on_policy_share(s, start, warmup) for s in (step, step + more))
    assert start <= now <= later <= 1.0 + 1e-12
    if warmup and step >= warmup:
        assert now == pytest.approx(1.0)


def test_seed_then_imitate() -> None:
    def at(step: int) -> tuple[LossWeights, LossWeights]:
        weights = seeding_weights(step, alpha=0.7, on_policy=0.5, seed_steps=3, ce=0.5)
        return weights.texts, weights.rollouts

    seeding = LossWeights(ce=0.5, kl=0.5), LossWeights(pg=0.0, kl=0.5)
    assert [at(step) for step in (0, 2)] == [seeding] * 2
    texts, rollouts = at(3)
    assert (texts.ce, texts.kl) == pytest.approx((0.5, 0.35))
    assert (rollouts.pg, rollouts.kl) == pytest.approx((0.3, 0.35))
    assert at(100) == at(3)
    with pytest.raises(ValueError, match=r"alpha=-0\.1"):
        seeding_weights(0, alpha=-0.1, on_policy=0.5)


@given(st.integers(0, 40), share, share, st.integers(0, 20), st.integers(0, 20))
def test_the_weights_of_reward_and_divergence_sum_to_one(
    step: int, alpha: float, on_policy: float, warmup: int, seed_steps: int
) -> None:
    weights = seeding_weights(
        step, alpha=alpha, on_policy=on_policy, on_policy_warmup=warmup, seed_steps=seed_steps
    )
    assert weights.texts.pg == 0.0 and weights.rollouts.ce == 0.0
    assert weights.texts.kl + weights.rollouts.kl + weights.rollouts.pg == pytest.approx(1.0)
    if step < seed_steps:
        assert weights.rollouts.pg == 0.0
