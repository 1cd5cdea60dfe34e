"""Generalised distillation: a divergence between the next-token distributions of teacher and student.

There are three choices: which divergence (``beta``), on which support (``support``, ``k``), and
whether single entries are clipped (``clip``).

Shapes: N positions, V vocabulary, K tokens of the support. Logarithms are natural (nats).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

FLOOR = -80.0
"""Replaces log 0, which occurs when k covers the vocabulary."""

SUPPORTS = ("teacher", "student", "full")


@dataclass(frozen=True)
class TopK:
    """A distribution of the teacher as ``top_k_with_tail`` returns it."""

    ids_NK: Tensor
    """Ids of the K likeliest tokens."""
    logprobs_NK1: Tensor
    """Their log-probabilities, then that of all other tokens together, in nats."""


def full_precision(logits: Tensor) -> Tensor:
    """Convert to at least float32: a softmax over a vocabulary in half precision loses its tail."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def logprobs_of(logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """Return the log-probability of one token per position, [N]."""
    return -cross_entropy(full_precision(logits_NV), tokens_N, reduction="none")


def top_k_with_tail(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Reduce logits to the ids of the k likeliest tokens and k+1 log-probabilities.

    The last log-probability is that of all other tokens together, so the k+1 probabilities sum to
    one. A top-k without the tail does not, and its "KL" can become negative.

    Returns:
        Token ids [N, K] and log-probabilities [N, K+1], in nats.
    """
    ids_NK = logits_NV.topk(min(k, logits_NV.shape[-1]), dim=-1).indices
    return ids_NK, on_support(logits_NV, ids_NK)


def on_support(logits_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Return the log-probabilities of the tokens ``ids_NK`` and of the tail bin, [N, K+1], in nats."""
    logprobs_NK: Tensor = _OnSupport.apply(full_precision(logits_NV), ids_NK)
    return logprobs_NK


class _OnSupport(torch.autograd.Function):
    """Log-probabilities on a support, with one saved tensor of vocabulary size.

    The saved tensor is e^(z-max) outside the support. With R its sum, T the whole sum and G the sum
    of the upstream gradient g, the gradient of a token in the tail is e^(z-max) (g_tail/R - G/T),
    that of a token k of the support g_k - G p_k.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, ids_NK: Tensor) -> Tensor:
        most_N1 = logits_NV.amax(-1, keepdim=True)
        rest_NV = (logits_NV - most_N1).exp_()
        odds_NK = rest_NV.gather(-1, ids_NK)
        # The tail is summed directly: 1 - sum(exp) of a confident model is rounding noise, and
        # flooring that would remove the gradient where the student is most wrong.
        rest_NV.scatter_(-1, ids_NK, 0.0)
        tail_N1 = rest_NV.sum(-1, keepdim=True)
        total_N1 = tail_N1 + odds_NK.sum(-1, keepdim=True)
        bins_NK1 = torch.cat([logits_NV.gather(-1, ids_NK) - most_N1, tail_N1.log()], -1)
        logprobs_NK1 = bins_NK1 - total_N1.log()
        if ctx.needs_input_grad[0]:
            below_NK1 = logprobs_NK1 < FLOOR
            ctx.save_for_backward(rest_NV, ids_NK, odds_NK, tail_N1, total_N1, below_NK1)
        return logprobs_NK1.clamp_min_(FLOOR)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_NK1: Tensor) -> tuple[Tensor, None]:
        rest_NV, ids_NK, odds_NK, tail_N1, total_N1, below_NK1 = ctx.saved_tensors
        upstream_NK1 = upstream_NK1.masked_fill(below_NK1, 0.0)
        share_N1 = upstream_NK1.sum(-1, keepdim=True) / total_N1
        # A tail that underflows is below the floor, where its gradient is already masked.
        tail_N1 = tail_N1.clamp_min(torch.finfo(tail_N1.dtype).tiny)
        gradient_NV = rest_NV * (upstream_NK1[..., -1:] / tail_N1 - share_N1)
        gradient_NV.scatter_(-1, ids_NK, upstream_NK1[..., :-1] - share_N1 * odds_NK)
        return gradient_NV, None


def divergence(
    teacher: Tensor | TopK,
    student_NV: Tensor,
    *,
    beta: float,
    support: str = "teacher",
    k: int = 32,
    clip: float | None = None,
) -> Tensor:
    """Compute F(teacher || student), step 1 of Knowledge Seeding, at each position.

    Args:
        teacher: Logits [N, V] or, for the support ``teacher``, a ``TopK``.
        student_NV: The student's logits.
        beta: See ``generalised_jsd``.
        support: ``teacher`` or ``student`` compare the k likeliest tokens of that model plus one
            tail bin (the student's are selected without gradient); ``full`` compares the whole
            vocabulary.
        k: Number of tokens of the support.
        clip: See ``generalised_jsd``.

    Returns:
        Divergences [N], in nats.

    Raises:
        ValueError: ``support`` is unknown, or needs more of the teacher than its ``TopK``.
    """
    if support not in SUPPORTS:
        raise ValueError(f"support={support!r} must be one of {', '.join(SUPPORTS)}")
    if isinstance(teacher, TopK):
        if support != "teacher":
            raise ValueError(
                f"support={support!r} needs the teacher's logits, but only its top k were given; "
                "pass the logits or set support='teacher'"
            )
        ids_NK, teacher_NK1 = teacher.ids_NK, teacher.logprobs_NK1
    elif support == "full":
        teacher_NV, student_NV = full_precision(teacher), full_precision(student_NV)
        return generalised_jsd(teacher_NV.log_softmax(-1), student_NV.log_softmax(-1), beta, clip)
    else:
        chooser_NV = teacher if support == "teacher" else student_NV.detach()
        ids_NK = chooser_NV.topk(min(k, chooser_NV.shape[-1]), dim=-1).indices
        teacher_NK1 = on_support(teacher, ids_NK)
    return generalised_jsd(teacher_NK1, on_support(student_NV, ids_NK), beta, clip)


def generalised_jsd(
    teacher_NK: Tensor, student_NK: Tensor, beta: float, clip: float | None = None
) -> Tensor:
    """Compute the token-level JSD(beta) of GKD (2306.13649, eq. 1).

    With M = beta*T + (1-beta)*S it is beta*KL(T||M) + (1-beta)*KL(S||M). At the ends it is the
    limit of JSD/beta or JSD/(1-beta), so beta=0 is the forward KL(T||S) and beta=1 the reverse
    KL(S||T).

    Args:
        teacher_NK: The teacher's log-probabilities on a support that sums to one. They get no
            gradient.
        student_NK: The student's log-probabilities on the same support.
        beta: Interpolates between forward (0) and reverse KL (1).
        clip: Upper bound of one entry's contribution (OPSD's pointwise clip, 2601.18734: 0.05 with
            the forward KL), so that a few style tokens do not dominate the loss. Entries have no
            lower bound, so the clipped sum can be negative; without ``clip`` the result never is.

    Returns:
        Divergences [N], in nats.

    Raises:
        ValueError: ``beta`` is outside of [0, 1], or ``clip`` is not positive.
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta={beta} must lie in [0, 1]")
    if clip is not None and clip <= 0.0:
        raise ValueError(f"clip={clip} must be greater than 0; None turns it off")
    return _Divergence.apply(teacher_NK, student_NK, beta, clip)


class _Divergence(torch.autograd.Function):
    """Sum of the entries f(t, s), with one saved tensor: the slope df/ds of each entry.

        beta=0: f = e^t (t-s),  df/ds = -e^t.    beta=1: f = e^s (s-t),  df/ds = e^s (s-t+1).
        Else, with m = log(beta e^t + (1-beta) e^s): f = beta e^t (t-m) + (1-beta) e^s (s-m),
        df/ds = (1-beta) e^s (s-m), since the terms in dm/ds cancel.

    Plain autograd computes the same but saves ten tensors of this size.
    """

    @staticmethod
    def forward(
        ctx: Any, teacher_NK: Tensor, student_NK: Tensor, beta: float, clip: float | None
    ) -> Tensor:
        # log 0 is floored in on_support, so 0 * (finite) is 0 here.
        if beta == 0.0:
            teacher_probs_NK = teacher_NK.exp()
            entries_NK = (teacher_NK - student_NK).mul_(teacher_probs_NK)
            slope_NK = teacher_probs_NK.neg_()
        elif beta == 1.0:
            student_probs_NK = student_NK.exp()
            gap_NK = student_NK - teacher_NK
            entries_NK = gap_NK * student_probs_NK
            slope_NK = gap_NK.add_(1.0).mul_(student_probs_NK)
        else:
            mixture_NK = torch.logaddexp(
                teacher_NK + math.log(beta), student_NK + math.log1p(-beta)
            )
            slope_NK = (student_NK - mixture_NK).mul_(student_NK.exp()).mul_(1.0 - beta)
            entries_NK = (teacher_NK - mixture_NK).mul_(teacher_NK.exp()).mul_(beta)
            entries_NK.add_(slope_NK)
        if clip is None:
            total_N = entries_NK.sum(-1).clamp_min(0.0)  # rounding can make it negative
        else:
            slope_NK.masked_fill_(entries_NK > clip, 0.0)
            total_N = entries_NK.clamp_(max=clip).sum(-1)
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(slope_NK)
        return total_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[None, Tensor, None, None]:
        (slope_NK,) = ctx.saved_tensors
        return None, slope_NK * upstream_N[..., None], None, None
