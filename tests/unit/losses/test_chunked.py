"""Divergences on every support, and the chunked losses against the naive ones."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sleeprl.losses import chunked
from sleeprl.losses.chunked import chunked_values
from sleeprl.losses.combined import chunked_combined_loss, combined_loss, token_counts
from sleeprl.losses.divergence import (
    TopK,
    divergence,
    generalised_jsd,
    on_support,
    top_k_with_tail,
)
from sleeprl.losses.off_policy import ImportanceWeight
from sleeprl.losses.types import LossBatch, LossOptions, LossWeights
from sleeprl.plugins import BUILTIN, create

BETAS = [0.0, 0.3, 1.0]


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def jsd_by_autograd(t: Tensor, s: Tensor, beta: float, clip: float | None) -> Tensor:
    """The formula, entry by entry, differentiated by autograd alone."""
    p, q = t.exp(), s.exp()
    m = (beta * p + (1 - beta) * q).log()
    entries = {0.0: p * (t - s), 1.0: q * (s - t)}.get(
        beta, beta * p * (t - m) + (1 - beta) * q * (s - m)
    )
    return (entries if clip is None else entries.clamp(max=clip)).sum(-1)


# --- divergence -------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.0, 1e-3, 0.1, 0.5, 0.9, 1.0]),
    st.sampled_from([None, 0.02, 0.2]),
    st.floats(0.1, 4.0),
)
def test_divergence_and_its_slope_are_those_of_the_formula(
    seed: int, beta: float, clip: float | None, scale: float
) -> None:
    teacher = normal(seed, 5, 7, scale=scale).log_softmax(-1)
    ours, plain = (normal(seed + 1, 5, 7, scale=scale).requires_grad_() for _ in range(2))
    got = generalised_jsd(teacher, ours.log_softmax(-1), beta, clip)
    expected = jsd_by_autograd(teacher, plain.log_softmax(-1), beta, clip)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-9)
    upstream = normal(seed + 2, 5)
    got.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, plain.grad, atol=1e-12, rtol=1e-8)


def test_pointwise_clip_by_hand() -> None:
    teacher = torch.tensor([[0.6, 0.3, 0.1]]).log()
    student = torch.tensor([[0.1, 0.4, 0.5]]).log().requires_grad_()
    entries = [0.6 * math.log(6), 0.3 * math.log(0.75), 0.1 * math.log(0.2)]  # 1.075, -0.086, -0.16
    got = generalised_jsd(teacher, student, 0.0, 0.05)
    assert got.item() == pytest.approx(0.05 + entries[1] + entries[2], rel=1e-5)
    assert got.item() < 0.0  # entries are not bounded below, as in OPSD
    got.backward()
    assert student.grad is not None
    # The clipped entry pulls no more; the others as in the plain KL.
    torch.testing.assert_close(student.grad, torch.tensor([[0.0, -0.3, -0.1]]))
    loose = generalised_jsd(teacher, student, 0.0, 9.0)
    torch.testing.assert_close(loose, generalised_jsd(teacher, student, 0.0))
    with pytest.raises(ValueError, match=r"clip=0\.0"):
        generalised_jsd(teacher, student, 0.0, 0.0)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("k", [1, 3, 8])
def test_support_is_whose_k_it_says(beta: float, k: int) -> None:
    teacher, student = normal(1, 6, 8, scale=2.0), normal(2, 6, 8, scale=2.0)
    for support, chooser in (("teacher", teacher), ("student", student)):
        got = divergence(teacher, student, beta=beta, support=support, k=k)
        order = chooser.argsort(-1, descending=True)
        p, q = (x.softmax(-1).gather(-1, order) for x in (teacher, student))
        if k < 8:
            p, q = (torch.cat([x[:, :k], x[:, k:].sum(-1, keepdim=True)], -1) for x in (p, q))
        expected = jsd_by_autograd(p.log(), q.log(), beta, None)
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-8)
    kept = TopK(*top_k_with_tail(teacher, k))
    torch.testing.assert_close(
        divergence(kept, student, beta=beta),
        divergence(teacher, student, beta=beta, support="teacher", k=k),
    )


def test_full_support_is_the_finest() -> None:
    teacher, student = normal(3, 20, 9, scale=2.0), normal(4, 20, 9, scale=2.0)
    full = divergence(teacher, student, beta=0.0, support="full")
    expected = jsd_by_autograd(teacher.log_softmax(-1), student.log_softmax(-1), 0.0, None)
    torch.testing.assert_close(full, expected)
    for support in ("teacher", "student"):
        assert (divergence(teacher, student, beta=0.0, support=support, k=3) <= full + 1e-9).all()


def test_divergence_refuses_what_it_cannot_have() -> None:
    teacher, student = normal(5, 2, 6), normal(6, 2, 6)
    with pytest.raises(ValueError, match=r"support='both'.*teacher, student, full"):
        divergence(teacher, student, beta=0.0, support="both")
    kept = TopK(*top_k_with_tail(teacher, 2))
    for support in ("student", "full"):
        with pytest.raises(ValueError, match=r"only its top k.*support='teacher'"):
            divergence(kept, student, beta=0.0, support=support)


def test_a_support_of_the_whole_vocabulary_has_a_finite_gradient() -> None:
    student = normal(7, 3, 5).requires_grad_()
    teacher = TopK(*top_k_with_tail(normal(8, 3, 5), 5))
    divergence(teacher, student, beta=0.0).sum().backward()
    assert student.grad is not None
    expected = student.detach().softmax(-1) - normal(8, 3, 5).softmax(-1)
    torch.testing.assert_close(student.grad, expected, atol=1e-9, rtol=1e-7)


# --- chunked values ---------------------------------------------------------------


def two_values(tokens: Tensor, teacher: Tensor, beta: float, support: str) -> chunked.Values:
    def values(logits: Tensor, part: slice) -> list[Tensor]:
        logprobs = logits.log_softmax(-1).gather(-1, tokens[part, None]).squeeze(-1)
        return [logprobs, divergence(teacher[part], logits, beta=beta, support=support, k=2)]

    return values


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("support", ["teacher", "student", "full"])
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_gradcheck(beta: float, support: str, chunk: int) -> None:
    hidden, head = normal(10, 5, 3).requires_grad_(), normal(11, 6, 3).requires_grad_()
    values = two_values(torch.tensor([0, 5, 2, 2, 1]), normal(12, 5, 6), beta, support)

    def loss(hidden: Tensor, head: Tensor) -> tuple[Tensor, ...]:
        return chunked_values(hidden, head, values, [True, True], chunk=chunk)

    assert torch.autograd.gradcheck(loss, (hidden, head))
    assert torch.autograd.gradcheck(lambda h: loss(h, head.detach()), (hidden,))
    assert torch.autograd.gradcheck(lambda w: loss(hidden.detach(), w), (head,))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    positions=st.integers(0, 9),
    width=st.integers(1, 5),
    vocabulary=st.integers(1, 12),
    chunk=st.integers(1, 12),
    beta=st.floats(0.0, 1.0),
    support=st.sampled_from(["teacher", "student", "full"]),
)
def test_chunked_values_are_the_naive_ones(
    seed: int,
    positions: int,
    width: int,
    vocabulary: int,
    chunk: int,
    beta: float,
    support: str,
) -> None:
    tokens = torch.randint(vocabulary, (positions,))
    values = two_values(tokens, normal(seed, positions, vocabulary), beta, support)
    upstream = [normal(seed + 1, positions), normal(seed + 2, positions)]
    found = []
    for size in (None, chunk):
        hidden = normal(seed + 3, positions, width).requires_grad_()
        head = normal(seed + 4, vocabulary, width).requires_grad_()
        if size is None:
            got = values(hidden @ head.T, slice(None))
        else:
            got = list(chunked_values(hidden, head, values, [True, True], chunk=size))
        torch.autograd.backward(got, upstream)
        found.append([*(value.detach() for value in got), hidden.grad, head.grad])
    for naive, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, naive, atol=1e-10, rtol=1e-8)


def test_no_more_than_a_chunk_of_logits_is_seen_and_each_position_once() -> None:
    seen: list[tuple[int, slice]] = []

    def values(logits: Tensor, part: slice) -> list[Tensor]:
        seen.append((len(logits), part))
        return [logits.logsumexp(-1)]

    hidden, head = normal(13, 7, 3).requires_grad_(), normal(14, 6, 3)
    (got,) = chunked_values(hidden, head, values, [True], chunk=3)
    got.sum().backward()
    # A frozen head is not needed again: nothing is recomputed.
    assert seen == [(3, slice(0, 3)), (3, slice(3, 6)), (1, slice(6, 9))]
    with pytest.raises(ValueError, match="chunk=0"):
        chunked_values(hidden, head, values, [True], chunk=0)


def test_a_value_without_gradient_has_none_and_costs_none() -> None:
    hidden, head = normal(15, 4, 3).requires_grad_(), normal(16, 6, 3)
    values = two_values(torch.zeros(4, dtype=torch.long), normal(17, 4, 6), 0.0, "full")
    logprobs, kl = chunked_values(hidden, head, values, [False, True], chunk=2)
    assert not logprobs.requires_grad and kl.requires_grad
    with torch.no_grad():
        quiet = chunked_values(hidden, head, values, [True, True], chunk=2)
    assert not any(value.requires_grad for value in quiet)
    torch.testing.assert_close(quiet[1], kl.detach())


def test_half_precision_is_upcast_in_the_loss_only() -> None:
    hidden, head = normal(18, 40, 16).bfloat16().requires_grad_(), normal(19, 30, 16).bfloat16()
    head.requires_grad_()
    teacher = normal(20, 40, 30)
    tokens = torch.arange(40) % 30

    def values(logits: Tensor, part: slice) -> list[Tensor]:
        assert logits.dtype == torch.bfloat16
        return two_values(tokens, teacher, 0.5, "full")(logits.float(), part)

    gradients = []
    for size in (None, 7):
        hidden.grad = head.grad = None
        if size is None:
            got = values(hidden @ head.T, slice(None))
        else:
            got = list(chunked_values(hidden, head, values, [True, True], chunk=size))
        (got[1] - got[0]).mean().backward()
        assert hidden.grad is not None and head.grad is not None
        assert got[0].dtype != torch.bfloat16 and hidden.grad.dtype == torch.bfloat16
        gradients.append((hidden.grad.float(), head.grad.float()))
    for naive, ours in zip(*gradients, strict=True):
        assert (ours - naive).norm() <= 0.01 * naive.norm()


# --- the streams, chunked ---------------------------------------------------------

PARTS = {
    "new": LossWeights(kl=0.7, ce=0.5),
    "replay": LossWeights(kl=0.3),
    "student": LossWeights(pg=0.4, kl=0.2),
    "plain": LossWeights(ce=1.0),
    "absent": LossWeights(ce=9.0),
}
PART_OF = ["new", "replay", "student", "new", "student", "replay", "plain"]
LENGTHS = [5, 2, 4, 1, 3, 5, 0]
B, R, H, V = 7, 5, 3, 11


def batch(source: str, top_k: int, scale: float = 1.0) -> tuple[Tensor, Tensor, LossBatch]:
    """Hidden states and head that want a gradient, and a window whose teacher is ``source``."""
    hidden, head = normal(30, B, R, H), normal(31, V, H)
    teacher_hidden = normal(32, B, R, H, scale=scale)
    teacher_logits = teacher_hidden @ head.T
    window = LossBatch(
        tokens_BR=torch.randint(0, V, (B, R), generator=torch.Generator().manual_seed(33)),
        mask_BR=(torch.arange(R) < torch.tensor(LENGTHS)[:, None]).double(),
        part=PART_OF,
        advantages_BR=torch.tensor([0.0, 0.0, 1.5, 0.0, -0.5, 0.0, 0.0]).double()[:, None],
        rollout_logprobs_BR=-normal(34, B, R).abs(),
    )
    if source == "top-k":
        window.teacher_ids_BRK, window.teacher_logprobs_BRK1 = top_k_with_tail(
            teacher_logits, top_k
        )
    elif source == "hidden":
        window.teacher_hidden_BRH = teacher_hidden
    else:
        window.teacher_logits_BRV = teacher_logits
    return hidden.requires_grad_(), head.requires_grad_(), window


@settings(deadline=None, max_examples=40)
@given(
    chunk=st.integers(1, 40),
    beta=st.floats(0.0, 1.0),
    support=st.sampled_from(["teacher", "student", "full"]),
    source=st.sampled_from(["top-k", "hidden", "logits"]),
    top_k=st.integers(1, 12),
    clip=st.sampled_from([None, 0.05]),
    name=st.sampled_from(list(BUILTIN["algorithm"])),
    level=st.sampled_from(["token", "sequence", "geometric", "off"]),
)
def test_chunked_combined_loss_is_combined_loss(
    chunk: int,
    beta: float,
    support: str,
    source: str,
    top_k: int,
    clip: float | None,
    name: str,
    level: str,
) -> None:
    options = LossOptions(
        beta=beta,
        top_k=top_k,
        importance_weight=ImportanceWeight(level),
        support="teacher" if source == "top-k" else support,
        pointwise_clip=clip,
        algorithm=create(name, "algorithm", {}),
        max_response_tokens=9,
    )
    counts = token_counts(PARTS, PART_OF, LENGTHS)
    naive_source = "logits" if source == "hidden" else source
    hidden, head, window = batch(naive_source, top_k)
    naive, naive_metrics = combined_loss(hidden @ head.T, window, PARTS, counts, options)
    naive.backward()
    ours_hidden, ours_head, window = batch(source, top_k)
    ours, metrics = chunked_combined_loss(
        ours_hidden, ours_head, window, PARTS, counts, options, chunk=chunk
    )
    ours.backward()
    torch.testing.assert_close(ours, naive, atol=1e-10, rtol=1e-8)
    assert metrics == pytest.approx(naive_metrics, abs=1e-9)
    assert {"new/ce", "new/kl", "replay/kl", "student/pg", "student/ratio"} <= set(metrics)
    torch.testing.assert_close(ours_hidden.grad, hidden.grad, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(ours_head.grad, head.grad, atol=1e-10, rtol=1e-8)
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0


def test_a_teacher_with_its_own_head() -> None:
    counts = token_counts(PARTS, PART_OF, LENGTHS)
    options = LossOptions(beta=0.5, support="full")
    hidden, head, window = batch("hidden", 1)
    other = normal(40, V, H)
    _, ours = chunked_combined_loss(
        hidden, head, window, PARTS, counts, options, teacher_head_VH=other
    )
    assert window.teacher_hidden_BRH is not None
    window.teacher_logits_BRV = window.teacher_hidden_BRH @ other.T
    window.teacher_hidden_BRH = None
    _, naive = combined_loss(hidden @ head.T, window, PARTS, counts, options)
    assert ours == pytest.approx(naive, abs=1e-9)


def test_hidden_teacher_states_need_a_head() -> None:
    hidden, head, window = batch("hidden", 1)
    counts = token_counts(PARTS, PART_OF, LENGTHS)
    with pytest.raises(ValueError, match=r"teacher_hidden_BRH.*chunked_combined_loss"):
        combined_loss(hidden @ head.T, window, PARTS, counts, LossOptions())


def test_a_batch_without_parts_keeps_the_graph() -> None:
    hidden, head, window = batch("hidden", 1)
    window = dataclasses.replace(window, part=[""] * B)
    counts = token_counts(PARTS, PART_OF, LENGTHS)
    loss, metrics = chunked_combined_loss(hidden, head, window, PARTS, counts, LossOptions())
    loss.backward()
    assert loss.item() == 0.0 and metrics == {}
    assert hidden.grad is not None and (hidden.grad == 0).all()


def test_the_default_chunk_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked.CHUNK_LOGITS, "cpu", 60)
    monkeypatch.setattr(chunked, "CHUNK_POSITIONS", 4)
    sizes: list[int] = []

    def values(logits: Tensor, part: slice) -> list[Tensor]:
        sizes.append(len(logits))
        return [logits.sum(-1)]

    chunked_values(normal(50, 12, 2), normal(51, 10, 2), values, [False])  # 60 / 10
    chunked_values(normal(50, 12, 2), normal(51, 30, 2), values, [False])  # at least 4
    assert sizes == [6, 6, 4, 4, 4]


def test_on_support_of_no_position() -> None:
    assert on_support(torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.long)).shape == (0, 3)
