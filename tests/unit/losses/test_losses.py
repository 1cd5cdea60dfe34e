"""The loss code against formulas written out by hand and against plain autograd."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sleeprl.consolidation.imitation_reward import imitation_reward, lexical, semantic
from sleeprl.losses.combined import add_metrics, combined_loss, token_counts
from sleeprl.losses.divergence import FLOOR, generalised_jsd, on_support, top_k_with_tail
from sleeprl.losses.off_policy import ImportanceWeight, mismatch_metrics
from sleeprl.losses.types import LossBatch, LossOptions, LossWeights
from sleeprl.text.normalise import normalise

E = math.e


def logits(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distributions(seed: int, rows: int = 20, support: int = 9) -> tuple[Tensor, Tensor]:
    """Log-probabilities of two families of random distributions."""
    return (
        logits(seed, rows, support).log_softmax(-1),
        logits(seed + 1, rows, support).log_softmax(-1),
    )


def kl(p_NK: Tensor, q_NK: Tensor) -> Tensor:
    return (p_NK.double().exp() * (p_NK.double() - q_NK.double())).sum(-1)


# --- divergence -------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_jsd_is_the_formula(beta: float) -> None:
    teacher, student = distributions(1)
    mixture = (beta * teacher.double().exp() + (1 - beta) * student.double().exp()).log()
    by_hand = {
        0.0: kl(teacher, student),
        1.0: kl(student, teacher),
    }.get(beta, beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture))
    torch.testing.assert_close(
        generalised_jsd(teacher, student, beta).double(), by_hand, atol=1e-6, rtol=1e-5
    )


def test_jsd_limits_are_the_two_kls() -> None:
    teacher, student = ((x.double() / 2).log_softmax(-1) for x in distributions(2))
    small = 1e-4
    torch.testing.assert_close(
        generalised_jsd(teacher, student, small) / small, kl(teacher, student), atol=1e-2, rtol=0.02
    )
    torch.testing.assert_close(
        generalised_jsd(teacher, student, 1 - small) / small,
        kl(student, teacher),
        atol=1e-2,
        rtol=0.02,
    )


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.floats(0.0, 1.0), st.floats(0.01, 12.0))
def test_jsd_is_never_negative_and_zero_only_at_equality(
    seed: int, beta: float, scale: float
) -> None:
    teacher = logits(seed, 8, 7, scale=scale).log_softmax(-1)
    student = logits(seed + 1, 8, 7, scale=scale).log_softmax(-1)
    assert (generalised_jsd(teacher, student, beta) >= 0).all()
    assert generalised_jsd(teacher, teacher, beta).abs().max() < 1e-6
    if 0.05 <= beta <= 0.95 and scale >= 1.0:
        apart = (teacher.exp() - student.exp()).abs().max(-1).values > 0.05
        assert (generalised_jsd(teacher, student, beta)[apart] > 1e-5).all()


@pytest.mark.parametrize("beta", [-0.01, 1.01])
def test_jsd_refuses_beta_outside_the_unit_interval(beta: float) -> None:
    teacher, student = distributions(3)
    with pytest.raises(ValueError, match="beta"):
        generalised_jsd(teacher, student, beta)


@pytest.mark.parametrize("k", [1, 4, 8, 31, 32, 100])
def test_top_k_with_tail_is_a_distribution(k: int) -> None:
    raw = logits(4, 10, 32)
    ids, teacher = top_k_with_tail(raw, k)
    kept = min(k, 32)
    assert ids.shape == (10, kept)
    assert teacher.shape == (10, kept + 1)
    torch.testing.assert_close(teacher.exp().sum(-1), torch.ones(10), atol=1e-6, rtol=0)
    student = on_support(logits(5, 10, 32), ids)
    torch.testing.assert_close(student.exp().sum(-1), torch.ones(10), atol=1e-6, rtol=0)
    probabilities = raw.softmax(-1)
    torch.testing.assert_close(teacher[:, :kept].exp(), probabilities.gather(-1, ids))
    others = probabilities.scatter(-1, ids, 0.0).max(-1).values
    assert (probabilities.gather(-1, ids).min(-1).values >= others).all()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_whole_vocabulary_as_support_gives_the_full_divergence(beta: float) -> None:
    teacher, student = logits(6, 10, 40), logits(7, 10, 40)
    ids, kept = top_k_with_tail(teacher, 40)
    full = generalised_jsd(teacher.log_softmax(-1), student.log_softmax(-1), beta)
    torch.testing.assert_close(
        generalised_jsd(kept, on_support(student, ids), beta), full, atol=2e-5, rtol=1e-5
    )


def test_binning_the_tail_never_adds_divergence() -> None:
    """Data processing: a coarser support cannot tell two distributions further apart."""
    teacher, student = logits(8, 50, 40), logits(9, 50, 40)
    last = torch.zeros(50)
    for k in (1, 4, 16, 39):
        ids, kept = top_k_with_tail(teacher, k)
        now = generalised_jsd(kept, on_support(student, ids), 0.0)
        assert (now >= last - 1e-5).all()
        last = now


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_gradient_of_the_divergence_is_that_of_the_naive_one(beta: float) -> None:
    teacher = logits(10, 6, 12).double()
    start = logits(11, 6, 12).double()
    k = 4
    ours = start.clone().float().requires_grad_()
    ids, kept = top_k_with_tail(teacher, k)
    generalised_jsd(kept, on_support(ours, ids), beta).sum().backward()

    naive = start.clone().requires_grad_()
    order = teacher.argsort(-1, descending=True)
    p, q = (x.softmax(-1).gather(-1, order) for x in (teacher, naive))
    p, q = (torch.cat([x[:, :k], x[:, k:].sum(-1, keepdim=True)], -1) for x in (p, q))
    m = beta * p + (1 - beta) * q
    loss = {
        0.0: (p * (p / q).log()).sum(),
        1.0: (q * (q / p).log()).sum(),
    }.get(beta, beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum())
    loss.backward()
    assert ours.grad is not None and naive.grad is not None
    torch.testing.assert_close(ours.grad.double(), naive.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("where", [slice(0, 1), slice(3, 6)], ids=["kept", "tail"])
@pytest.mark.parametrize("far", [0.0, -60.0, -200.0, -2000.0])
def test_a_support_is_that_of_the_plain_form_and_so_is_its_gradient(
    where: slice, far: float
) -> None:
    """Also of a token, or of a whole tail, that is all but impossible or below the floor."""
    ids = torch.tensor([[0, 1, 2]]).repeat(4, 1)
    base = logits(11, 4, 6).double()
    base[:, where] += far
    weights = torch.arange(1.0, 5.0, dtype=torch.float64)

    def plain(logits_NV: Tensor, ids_NK: Tensor) -> Tensor:
        tail_N1 = logits_NV.scatter(-1, ids_NK, -torch.inf).logsumexp(-1, keepdim=True)
        kept_NK1 = torch.cat([logits_NV.gather(-1, ids_NK), tail_N1], -1)
        return kept_NK1.log_softmax(-1).clamp_min(FLOOR)

    found = []
    for form in (plain, on_support):
        own = base.clone().requires_grad_()
        values = form(own, ids)
        found.append((values.detach(), torch.autograd.grad((values * weights).sum(), own)[0]))
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("gap", [10.0, 16.0, 25.0])
def test_the_tail_of_a_sure_student_is_right_and_still_pulls(gap: float) -> None:
    """A student sure of one token must still feel that the teacher leaves room for others."""
    vocabulary = 50
    sure = torch.zeros(1, vocabulary)
    sure[0, 7] = gap
    sure.requires_grad_()
    unsure = torch.zeros(1, vocabulary)
    unsure[0, 7] = 5.0
    ids, teacher = top_k_with_tail(unsure, 1)
    support = on_support(sure, ids)
    exact = math.log(vocabulary - 1) - math.log(vocabulary - 1 + math.exp(gap))
    assert support[0, -1].item() == pytest.approx(exact, rel=1e-3)
    generalised_jsd(teacher, support, 0.0).sum().backward()
    assert sure.grad is not None
    # d KL / d logit of the sure token = student's probability - teacher's.
    expected = sure.detach().softmax(-1)[0, 7] - unsure.softmax(-1)[0, 7]
    assert sure.grad[0, 7].item() == pytest.approx(expected.item(), rel=1e-2)


# --- off-policy correction --------------------------------------------------------

# One row of three tokens (the last is padding) with ratios 4 and 1/4, one with 3, 3, 1/3.
RATIOS = torch.tensor([[4.0, 0.25, 9.0], [3.0, 3.0, 1 / 3]])
MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
ROOT3 = 3 ** (1 / 3)
BY_HAND = {
    ("off", "truncate"): [[1, 1, 0], [1, 1, 1]],
    ("token", "truncate"): [[2, 0.25, 0], [2, 2, 1 / 3]],
    ("token", "clip"): [[2, 0.5, 0], [2, 2, 0.5]],
    ("token", "mask"): [[0, 0, 0], [0, 0, 0]],
    ("sequence", "truncate"): [[1, 1, 0], [2, 2, 2]],
    ("sequence", "clip"): [[1, 1, 0], [2, 2, 2]],
    ("sequence", "mask"): [[1, 1, 0], [0, 0, 0]],
    ("geometric", "truncate"): [[1, 1, 0], [ROOT3] * 3],
    ("geometric", "clip"): [[1, 1, 0], [ROOT3] * 3],
    ("geometric", "mask"): [[1, 1, 0], [ROOT3] * 3],
}


@pytest.mark.parametrize(("level", "mode"), list(BY_HAND))
def test_correction_by_hand(level: str, mode: str) -> None:
    behaviour = torch.full((2, 3), -2.0)
    learner = (behaviour + RATIOS.log()).requires_grad_()
    weights = ImportanceWeight(level, mode, low=0.5, high=2.0).weights(learner, behaviour, MASK)
    assert not weights.requires_grad
    torch.testing.assert_close(weights, torch.tensor(BY_HAND[level, mode], dtype=torch.float32))


def test_token_mask_keeps_what_lies_inside_the_band() -> None:
    ratios = torch.tensor([[0.49, 0.51, 1.0, 1.99, 2.01]])
    weights = ImportanceWeight("token", "mask").weights(
        ratios.log(), torch.zeros(1, 5), torch.ones(1, 5)
    )
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.51, 1.0, 1.99, 0.0]]))


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("mode", ["truncate", "clip", "mask"])
def test_correction_on_policy_and_far_off_is_finite(level: str, mode: str) -> None:
    correction = ImportanceWeight(level, mode)
    same = logits(12, 2, 3)
    torch.testing.assert_close(correction.weights(same, same, MASK), MASK)
    far = correction.weights(torch.zeros(2, 3), torch.full((2, 3), -500.0), MASK)
    assert torch.isfinite(far).all() and (far <= 2.0).all()


@pytest.mark.parametrize("mode", ["truncate", "clip", "mask"])
def test_what_is_outside_of_the_band_by_hand(mode: str) -> None:
    learner = torch.log(torch.tensor([[0.1, 0.6, 1.0, 2.5], [3.0, 0.5, 1.0, 1.0]]))
    behaviour, mask = torch.zeros(2, 4), torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0]])
    for level, right in {
        "token": [[1.0, 0, 0, 1], [1, 0, 0, 0]],
        "off": [[1.0, 0, 0, 1], [1, 0, 0, 0]],
        "sequence": [[1.0, 1, 1, 1], [0, 0, 0, 0]],  # the products are 0.15 and 1.5
        "geometric": [[0.0, 0, 0, 0], [0, 0, 0, 0]],  # their roots are 0.62 and 1.22
    }.items():
        found = ImportanceWeight(level, mode, 0.5, 2.0).outside(learner, behaviour, mask)
        assert found.tolist() == right, level


def test_mismatch_by_hand() -> None:
    found = mismatch_metrics(torch.tensor([[0.0, -1.0]]), torch.tensor([[0.0, -2.0]]))
    torch.testing.assert_close(found["ratio"], torch.tensor([[1.0, E]]))
    torch.testing.assert_close(found["mismatch_kl"], torch.tensor([[0.0, E - 2.0]]))


# --- imitation reward -------------------------------------------------------------

ids = st.lists(st.integers(0, 5), max_size=12)
share = st.floats(0.0, 1.0)


def edit_distance(a: list[int], b: list[int]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


@settings(max_examples=300)
@given(ids, ids, share)
def test_lexical_reward(a: list[int], b: list[int], threshold: float) -> None:
    reward = lexical(a, b, threshold)
    assert 0.0 <= reward <= 1.0
    assert reward == lexical(b, a, threshold)
    assert lexical(a, a, threshold) == 1.0
    longest, distance = max(len(a), len(b)), edit_distance(a, b)
    if distance > threshold * longest:
        assert reward == 0.0
    elif longest:
        assert reward == pytest.approx(1.0 - distance / longest)


@given(ids, ids, st.text(), st.text(), share, share)
def test_imitation_reward_mixes_both_parts(
    a: list[int], b: list[int], x: str, y: str, gamma: float, threshold: float
) -> None:
    def reward(gamma: float) -> float:
        return imitation_reward(a, b, semantic(x, y), gamma=gamma, threshold=threshold)

    assert 0.0 <= reward(gamma) <= 1.0
    assert reward(0.0) == lexical(a, b, threshold)
    assert reward(1.0) == semantic(x, y)
    mixed = gamma * semantic(x, y) + (1 - gamma) * lexical(a, b, threshold)
    assert reward(gamma) == pytest.approx(mixed)
    assert imitation_reward(a, a, 1.0, gamma=gamma, threshold=threshold) == pytest.approx(1.0)


def test_semantic_looks_at_words_only() -> None:
    assert normalise("  Oslo, NORWAY. ") == "oslo norway"
    assert semantic("Oslo.", "oslo") == 1.0
    assert semantic("Oslo", "Bergen") == 0.0


# --- the three streams ------------------------------------------------------------

PARTS = {
    "new": LossWeights(kl=0.7, ce=0.5),
    "replay": LossWeights(kl=0.3),
    "student": LossWeights(pg=0.4, kl=0.2),
    "absent": LossWeights(ce=9.0),
}
LENGTHS = [5, 2, 4, 1, 3, 5]
PART_OF = ["new", "replay", "student", "new", "student", "replay"]
OPTIONS = LossOptions(beta=0.3, top_k=4, importance_weight=ImportanceWeight("token", "truncate"))
V, R = 11, 5


def window(rows: list[int]) -> tuple[Tensor, LossBatch]:
    """Logits that need a gradient, and the rows ``rows`` of one fixed batch."""
    generator = torch.Generator().manual_seed(13)
    tokens = torch.randint(0, V, (6, R), generator=generator)
    mask = (torch.arange(R) < torch.tensor(LENGTHS)[:, None]).float()
    teacher_ids, teacher = top_k_with_tail(logits(14, 6, R, V), OPTIONS.top_k)
    chosen = logits(15, 6, R, V)[rows].requires_grad_()
    return chosen, LossBatch(
        tokens_BR=tokens[rows],
        mask_BR=mask[rows],
        part=[PART_OF[row] for row in rows],
        advantages_BR=torch.tensor([0.0, 0.0, 1.5, 0.0, -0.5, 0.0])[rows, None],
        rollout_logprobs_BR=-logits(16, 6, R).abs()[rows],
        teacher_ids_BRK=teacher_ids[rows],
        teacher_logprobs_BRK1=teacher[rows],
    )


def test_token_counts() -> None:
    counts = token_counts(PARTS, PART_OF, LENGTHS)
    assert counts.tolist() == [[6, 6, 2], [7, 7, 2], [7, 7, 2], [0, 0, 0]]
    assert counts.dtype == torch.float64
    scored = token_counts(PARTS, PART_OF, LENGTHS, [1.0, None, 0.0, 0.5, None, None])
    assert scored[:, 0].tolist() == [6, 7, 7, 0]
    kept = [[LENGTHS[row] for row in (0, 2, 3) if PART_OF[row] == name] for name in PARTS]
    assert scored[:, 1].tolist() == [sum(lengths) for lengths in kept]
    assert scored[:, 2].tolist() == [len(lengths) for lengths in kept]


def test_combined_loss_by_hand() -> None:
    raw, batch = window(list(range(6)))
    loss, metrics = combined_loss(raw, batch, PARTS, token_counts(PARTS, PART_OF, LENGTHS), OPTIONS)
    # Token by token, in the plainest way there is.
    totals = dict.fromkeys(["new/ce", "new/kl", "replay/kl", "student/pg", "student/kl"], 0.0)
    assert batch.teacher_ids_BRK is not None and batch.teacher_logprobs_BRK1 is not None
    for row, (part, length) in enumerate(zip(PART_OF, LENGTHS, strict=True)):
        for t in range(length):
            logp = raw[row, t].detach().log_softmax(-1)
            chosen = float(logp[batch.tokens_BR[row, t]])
            kept = batch.teacher_ids_BRK[row, t]
            p = batch.teacher_logprobs_BRK1[row, t].exp()
            q = torch.cat([logp[kept].exp(), 1 - logp[kept].exp().sum(-1, keepdim=True)])
            m = OPTIONS.beta * p + (1 - OPTIONS.beta) * q
            jsd = OPTIONS.beta * (p * (p / m).log()).sum()
            jsd += (1 - OPTIONS.beta) * (q * (q / m).log()).sum()
            if f"{part}/kl" in totals:
                totals[f"{part}/kl"] += float(jsd) / {"new": 6}.get(part, 7)
            if part == "new":
                totals["new/ce"] -= chosen / 6
            if part == "student":
                weight = min(2.0, math.exp(chosen - float(batch.rollout_logprobs_BR[row, t])))
                totals["student/pg"] -= weight * float(batch.advantages_BR[row, 0]) / 7
    for key, value in totals.items():
        assert metrics[key] == pytest.approx(value, abs=1e-5), key
    weights = {"new/ce": 0.5, "new/kl": 0.7, "replay/kl": 0.3, "student/pg": 0.4, "student/kl": 0.2}
    total = sum(weights[key] * value for key, value in totals.items())
    assert loss.item() == pytest.approx(total, abs=1e-5)
    assert not any(key.startswith("absent/") for key in metrics)
    assert {"student/mismatch_kl", "student/ratio"} <= set(metrics)


@pytest.mark.parametrize("level", ["token", "off"])
def test_what_a_correction_does_is_recorded_also_when_it_is_off(level: str) -> None:
    raw, batch = window(list(range(6)))
    options = dataclasses.replace(OPTIONS, importance_weight=ImportanceWeight(level))
    _, metrics = combined_loss(raw, batch, PARTS, token_counts(PARTS, PART_OF, LENGTHS), options)
    chosen = raw.detach().log_softmax(-1).gather(-1, batch.tokens_BR[..., None])[..., 0]
    mine = batch.mask_BR * torch.tensor([part == "student" for part in PART_OF])[:, None] == 1
    ratios = (chosen - batch.rollout_logprobs_BR)[mine].exp()
    weights = ratios.clamp(max=2.0) if level == "token" else torch.ones_like(ratios)
    assert metrics["student/weight_mean"] == pytest.approx(float(weights.mean()), abs=1e-5)
    outside = float(((ratios < 0.5) | (ratios > 2.0)).float().mean())
    assert 0 < outside < 1 and metrics["student/outside"] == pytest.approx(outside)


@pytest.mark.parametrize(
    "split", [[[0, 1, 2], [3, 4, 5]], [[0], [1], [2], [3], [4], [5]], [[5, 2]]]
)
def test_the_split_into_micro_batches_does_not_matter(split: list[list[int]]) -> None:
    split = [*split, [row for row in range(6) if not any(row in part for part in split)]]
    counts = token_counts(PARTS, PART_OF, LENGTHS)
    whole_logits, whole = window(list(range(6)))
    ages = [None, None, 0, None, 0, None]
    whole.age = ages
    loss, metrics = combined_loss(whole_logits, whole, PARTS, counts, OPTIONS)
    loss.backward()
    assert whole_logits.grad is not None
    assert {"student/age_0/share", "student/age_0/apart", "student/age_0/max"} <= set(metrics)
    total, summed = 0.0, dict[str, float]()
    for rows in filter(None, split):
        raw, batch = window(rows)
        batch.age = [ages[row] for row in rows]
        piece, shown = combined_loss(raw, batch, PARTS, counts, OPTIONS)
        piece.backward()
        assert raw.grad is not None
        torch.testing.assert_close(raw.grad, whole_logits.grad[rows])
        total += piece.item()
        add_metrics(summed, shown)
    assert total == pytest.approx(loss.item(), abs=1e-5)
    assert summed == pytest.approx(metrics, abs=1e-5)


def test_padding_has_no_gradient_and_no_part_keeps_the_graph() -> None:
    raw, batch = window(list(range(6)))
    counts = token_counts(PARTS, PART_OF, LENGTHS)
    combined_loss(raw, batch, PARTS, counts, OPTIONS)[0].backward()
    assert raw.grad is not None
    assert (raw.grad[batch.mask_BR == 0] == 0).all()
    assert (raw.grad[batch.mask_BR == 1].abs().sum(-1) > 0).all()

    idle, batch = window([0, 1])
    batch.part = ["", ""]
    loss, metrics = combined_loss(idle, batch, PARTS, counts, OPTIONS)
    loss.backward()
    assert loss.item() == 0.0 and metrics == {}
    assert idle.grad is not None and (idle.grad == 0).all()
