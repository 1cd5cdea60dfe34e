"""One loss for everything that learns: three streams over the parts of a batch.

A row of a batch belongs to a *part* ("new", "replay", "imitation", "dream", ...).
A part has a weight for each stream: ``pg`` (policy gradient), ``ce``
(cross-entropy) and ``kl`` (divergence from the teacher). Each stream of a part is
a mean over that part's tokens in the whole, global batch, so neither the length
of texts nor the split over ranks and micro-batches changes the objective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sleeprl.losses.divergence import generalised_jsd, on_support
from sleeprl.losses.policy import Correction, clipped_policy_loss, mismatch


@dataclass(frozen=True)
class Part:
    """Weights of the three streams for the rows of one part."""

    pg: float = 0.0
    ce: float = 0.0
    kl: float = 0.0


@dataclass(frozen=True)
class LossOptions:
    beta: float = 0.0
    top_k: int = 32
    clip_low: float = 0.2
    clip_high: float = 0.28
    correction: Correction = Correction()


@dataclass
class Window:
    """What the loss needs of B rows, padded to R response tokens.

    tokens_BR: sampled ids. mask_BR: 1 on response tokens. part: name per row.
    advantages_B, behaviour_BR: for ``pg`` rows, 0 elsewhere.
    teacher_ids_BRK, teacher_BRK1: the teacher's top-k ids and k+1 log-probabilities.
    """

    tokens_BR: Tensor
    mask_BR: Tensor
    part: Sequence[str]
    advantages_B: Tensor
    behaviour_BR: Tensor
    teacher_ids_BRK: Tensor | None = None
    teacher_BRK1: Tensor | None = None


def token_counts(
    parts: Mapping[str, Part], part_of: Sequence[str], lengths: Sequence[int]
) -> Tensor:
    """Response tokens of each part, [P] float64, in the order of ``parts``."""
    names = list(parts)
    counts = torch.zeros(len(names), dtype=torch.float64)
    for name, length in zip(part_of, lengths, strict=True):
        counts[names.index(name)] += length
    return counts


def stream_loss(
    logits_BRV: Tensor,
    window: Window,
    parts: Mapping[str, Part],
    counts_P: Tensor,
    options: LossOptions,
) -> tuple[Tensor, dict[str, float]]:
    """This micro-batch's share of the loss, and of each mean as ``part/stream``.

    counts_P: ``token_counts`` of the *global* batch. Summing the returned loss and
    the metrics over micro-batches and ranks gives the means.
    """
    logprobs_BRV = torch.log_softmax(logits_BRV.float(), dim=-1)
    logprobs_BR = logprobs_BRV.gather(-1, window.tokens_BR[..., None]).squeeze(-1)
    loss = logits_BRV.sum() * 0.0  # keeps the graph whole when no row has weight
    metrics: dict[str, float] = {}
    for index, (name, weight) in enumerate(parts.items()):
        rows = [row for row, part in enumerate(window.part) if part == name]
        count = float(counts_P[index])
        if not rows or count == 0:
            continue
        mask = window.mask_BR[rows]
        streams: dict[str, tuple[float, Tensor]] = {"ce": (weight.ce, -logprobs_BR[rows])}
        if weight.kl and window.teacher_ids_BRK is not None and window.teacher_BRK1 is not None:
            student = on_support(logits_BRV[rows], window.teacher_ids_BRK[rows])
            divergence = generalised_jsd(window.teacher_BRK1[rows], student, options.beta)
            streams["kl"] = (weight.kl, divergence)
        if weight.pg:
            behaviour, current = window.behaviour_BR[rows], logprobs_BR[rows]
            correction = options.correction.weights(current, behaviour, mask)
            policy = clipped_policy_loss(
                current, current, window.advantages_B[rows], options.clip_low, options.clip_high
            )
            streams["pg"] = (weight.pg, policy * correction)
            for key, values in mismatch(current, behaviour).items():
                metrics[f"{name}/{key}"] = float((values * mask).sum() / count)
        for stream, (factor, values) in streams.items():
            mean = (values * mask).sum() / count
            metrics[f"{name}/{stream}"] = float(mean.detach())
            if factor:
                loss = loss + factor * mean
    return loss, metrics
