"""Elastic weight consolidation (1612.00796): a quadratic penalty around what was known.

Near theta*, F is the curvature of the divergence from the old model, so with the
per-token Fisher used here the penalty is about that divergence in nats per token, as far
as the diagonal sees it. Parameters, anchors and Fishers have the same, any, shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def diagonal_fisher(
    parameters: Sequence[Tensor], passes: Iterable[Tensor], generator: torch.Generator
) -> list[Tensor]:
    """Estimate the diagonal of the Fisher information per token, one tensor per parameter.

    passes: logits [R, V] at the R predicted positions of one text each, in a graph that
    ends in ``parameters``. The tokens whose score is squared are drawn from these logits
    and not read from the text: with given labels it would be the empirical Fisher
    (1905.12558). Scores of drawn tokens have mean 0 given what stands before them, so the
    square of their sum is in expectation the sum of their squares: one backward pass a text.
    """
    fisher = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    tokens = 0
    for logits_RV in passes:
        logprobs_RV = logits_RV.float().log_softmax(-1)
        drawn_R1 = torch.multinomial(logprobs_RV.detach().exp(), 1, generator=generator)
        scores = torch.autograd.grad(
            logprobs_RV.gather(-1, drawn_R1).sum(), parameters, allow_unused=True
        )
        for total, score in zip(fisher, scores, strict=True):
            if score is not None:
                total += score.float() ** 2
        tokens += len(logits_RV)
    return [total / max(1, tokens) for total in fisher]


def ewc_penalty(value: Tensor, anchor: Tensor, fisher: Tensor) -> Tensor:
    """Return 1/2 * sum F (theta - theta*)^2, a scalar that is never negative."""
    return 0.5 * (fisher * (value - anchor) ** 2).sum()


def ewc_gradient(value: Tensor, anchor: Tensor, fisher: Tensor) -> Tensor:
    """Return the gradient of ``ewc_penalty``; element by element, so each rank can do its own share."""
    return fisher * (value - anchor)
