"""Generalised distillation: a divergence between teacher and student next-token distributions.

Shapes: N positions, V vocabulary, K teacher tokens. Everything is in natural
logarithms (nats).
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = -80.0
"""In place of log 0, where k covers the vocabulary."""


def top_k_with_tail(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Teacher support: the ids of the k likeliest tokens and k+1 log-probabilities.

    The last log-probability is that of all other tokens together, so the k+1
    numbers are a distribution; a truncated top-k without the tail is not one, and
    its "KL" can go negative.
    """
    logits_NV = logits_NV.float()
    ids_NK = logits_NV.topk(min(k, logits_NV.shape[-1]), dim=-1).indices
    return ids_NK, on_support(logits_NV, ids_NK)


def on_support(logits_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """The student's log-probabilities on the teacher's k tokens plus the tail bin, [N, K+1]."""
    logits_NV = logits_NV.float()
    # The tail from the logits themselves: 1 - sum(exp) of a sure model is rounding noise,
    # and flooring it takes away the gradient just where the student is most wrong.
    rest_NV = logits_NV.scatter(-1, ids_NK, float("-inf"))
    kept_N1 = torch.cat([logits_NV.gather(-1, ids_NK), rest_NV.logsumexp(-1, keepdim=True)], -1)
    return (kept_N1 - logits_NV.logsumexp(-1, keepdim=True)).clamp_min(FLOOR)


def generalised_jsd(teacher_NK: Tensor, student_NK: Tensor, beta: float) -> Tensor:
    """Token-level JSD(beta) of GKD (2306.13649), [N], in nats and never negative.

    With M = beta*T + (1-beta)*S: beta*KL(T||M) + (1-beta)*KL(S||M). The ends are
    the limits JSD/beta and JSD/(1-beta), so beta=0 is the forward KL(T||S) and
    beta=1 the reverse KL(S||T). Inputs are log-probabilities of one support that
    sums to one.
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta={beta} must lie in [0, 1]")
    if beta == 0.0:
        return _kl(teacher_NK, student_NK)
    if beta == 1.0:
        return _kl(student_NK, teacher_NK)
    weights = torch.tensor([beta, 1.0 - beta], device=teacher_NK.device).log()
    mixture_NK = torch.logaddexp(teacher_NK + weights[0], student_NK + weights[1])
    return beta * _kl(teacher_NK, mixture_NK) + (1.0 - beta) * _kl(student_NK, mixture_NK)


def _kl(p_NK: Tensor, q_NK: Tensor) -> Tensor:
    # log 0 is floored in on_support, so 0 * (finite) is 0 here.
    return (p_NK.exp() * (p_NK - q_NK)).sum(-1).clamp_min(0.0)
