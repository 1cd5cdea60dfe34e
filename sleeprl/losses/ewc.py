"""Elastic weight consolidation (1612.00796): a quadratic penalty on changes of important parameters.

Near theta*, the Fisher F is the curvature of the divergence from the old model. With the per-token
Fisher used here, the penalty approximates that divergence in nats per token, as far as the diagonal
captures it. Parameters, anchors and Fishers have the same, arbitrary shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def diagonal_fisher(
    parameters: Sequence[Tensor], passes: Iterable[Tensor], generator: torch.Generator
) -> list[Tensor]:
    """Estimate the diagonal of the Fisher information per token.

    Tokens are sampled from the logits and not read from the text: with given labels the result
    would be the empirical Fisher (1905.12558). The scores of sampled tokens have mean 0 given their
    prefix, so the square of their sum equals in expectation the sum of their squares, and one
    backward pass per text is enough.

    Args:
        parameters: The parameters, of any shapes.
        passes: Logits [R, V] at the R predicted positions of one text each, with a graph that ends
            in ``parameters``.
        generator: Source of the sampled tokens.

    Returns:
        One float32 tensor per parameter, of its shape.
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
    """Return 1/2 * sum F (theta - theta*)^2, a non-negative scalar."""
    return 0.5 * (fisher * (value - anchor) ** 2).sum()


def ewc_gradient(value: Tensor, anchor: Tensor, fisher: Tensor) -> Tensor:
    """Return the gradient of ``ewc_penalty``. It is elementwise, so each rank can compute its own shard."""
    return fisher * (value - anchor)
