"""One loss for everything that learns: three streams over the parts of a batch.

A row of a batch belongs to a *part* ("new", "replay", "imitation", "dream", ...).
A part has a weight for each stream: ``pg`` (policy gradient), ``ce``
(cross-entropy) and ``kl`` (divergence from the teacher). Each stream of a part is
a mean over that part's tokens in the whole, global batch, so neither the length
of texts nor the split over ranks and micro-batches changes the objective.

``stream_loss`` takes logits, ``chunked_stream_loss`` hidden states and the head; the
loss, its gradient and the metrics are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sleeprl.losses.chunked import Values, chunked_values
from sleeprl.losses.divergence import TopK, divergence, logprobs_of
from sleeprl.losses.policy import Correction, clipped_policy_loss, mismatch


@dataclass(frozen=True)
class Part:
    """Weights of the three streams for the rows of one part."""

    pg: float = 0.0
    ce: float = 0.0
    kl: float = 0.0


@dataclass(frozen=True)
class LossOptions:
    """beta, support, top_k, pointwise_clip: of the ``kl`` stream, see ``divergence``.

    proximal: the policy that the ``pg`` stream's ratio is taken to. ``current`` has
        ratio 1, so its gradient is that of REINFORCE, and being off-policy is left to
        ``correction``. ``behaviour`` is the policy that sampled (GRPO's ratio in method
        2.4): the clip bounds it, and ``correction`` is not applied on top.
    """

    beta: float = 0.0
    top_k: int = 32
    clip_low: float = 0.2
    clip_high: float = 0.28
    correction: Correction = Correction()
    support: str = "teacher"
    pointwise_clip: float | None = None
    proximal: str = "current"

    def __post_init__(self) -> None:
        if self.proximal not in ("current", "behaviour"):
            raise ValueError(f"proximal={self.proximal!r} must be 'current' or 'behaviour'")


@dataclass
class Window:
    """What the loss needs of B rows, padded to R response tokens.

    tokens_BR: sampled ids. mask_BR: 1 on response tokens. part: name per row.
    advantages_B, behaviour_BR: for ``pg`` rows, 0 elsewhere.
    The teacher of the ``kl`` stream is one of: teacher_ids_BRK and teacher_BRK1, its
    top-k ids and k+1 log-probabilities; teacher_logits_BRV; or, for
    ``chunked_stream_loss``, teacher_hidden_BRH.
    """

    tokens_BR: Tensor
    mask_BR: Tensor
    part: Sequence[str]
    advantages_B: Tensor
    behaviour_BR: Tensor
    teacher_ids_BRK: Tensor | None = None
    teacher_BRK1: Tensor | None = None
    teacher_logits_BRV: Tensor | None = None
    teacher_hidden_BRH: Tensor | None = None


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

    return _streams(
        lambda where_BR, values, _: values(logits_BRV[where_BR], slice(None)),
        logits_BRV,
        window,
        parts,
        counts_P,
        options,
        None,
    )


def chunked_stream_loss(
    hidden_BRH: Tensor,
    head_VH: Tensor,
    window: Window,
    parts: Mapping[str, Part],
    counts_P: Tensor,
    options: LossOptions,
    *,
    teacher_head_VH: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """``stream_loss`` of the logits ``hidden_BRH @ head_VH.T``, which are never there as a whole.

    hidden_BRH: the student's last hidden states at the positions that predict the
        response. Padding is not projected.
    teacher_head_VH: of a ``window.teacher_hidden_BRH``; by default the student's head,
        without gradient.
    chunk: see ``chunked_values``; it changes the memory used, not the result.
    """
    return _streams(
        lambda where_BR, values, differentiable: chunked_values(
            hidden_BRH[where_BR], head_VH, values, differentiable, chunk=chunk
        ),
        hidden_BRH,
        window,
        parts,
        counts_P,
        options,
        (head_VH if teacher_head_VH is None else teacher_head_VH).detach(),
    )


def _streams(
    evaluate: Callable[[Tensor, Values, Sequence[bool]], Sequence[Tensor]],
    anchor: Tensor,
    window: Window,
    parts: Mapping[str, Part],
    counts_P: Tensor,
    options: LossOptions,
    teacher_head_VH: Tensor | None,
) -> tuple[Tensor, dict[str, float]]:
    """evaluate: gives the values [N] of the N positions that are true in its mask [B, R]."""
    loss = anchor.sum() * 0.0  # keeps the graph whole when no row has weight
    metrics: dict[str, float] = {}
    for index, (name, weight) in enumerate(parts.items()):
        members = [part == name for part in window.part]
        count = float(counts_P[index])
        if not any(members) or count == 0:
            continue
        mask_BR = window.mask_BR * torch.tensor(members, device=window.mask_BR.device)[:, None]
        where_BR = mask_BR != 0
        teacher = _teacher(window, where_BR, teacher_head_VH) if weight.kl else None
        values = _token_values(window.tokens_BR[where_BR], teacher, options)
        differentiable = [bool(weight.ce or weight.pg)] + [True] * (teacher is not None)
        logprobs_BR, *divergence_BR = (
            found_N.new_zeros(where_BR.shape).masked_scatter(where_BR, found_N)
            for found_N in evaluate(where_BR, values, differentiable)
        )
        streams = {"ce": (weight.ce, -logprobs_BR)}
        if divergence_BR:
            streams["kl"] = (weight.kl, divergence_BR[0])
        if weight.pg:
            streams["pg"] = (weight.pg, _policy(logprobs_BR, mask_BR, window, options))
            for key, found_BR in mismatch(logprobs_BR, window.behaviour_BR).items():
                metrics[f"{name}/{key}"] = float((found_BR * mask_BR).sum() / count)
        for stream, (factor, found_BR) in streams.items():
            mean = (found_BR * mask_BR).sum() / count
            metrics[f"{name}/{stream}"] = float(mean.detach())
            if factor:
                loss = loss + factor * mean
    return loss, metrics


def _policy(logprobs_BR: Tensor, mask_BR: Tensor, window: Window, options: LossOptions) -> Tensor:
    current = options.proximal == "current"
    policy_BR = clipped_policy_loss(
        logprobs_BR,
        logprobs_BR if current else window.behaviour_BR,
        window.advantages_B,
        options.clip_low,
        options.clip_high,
    )
    if current:
        policy_BR = policy_BR * options.correction.weights(
            logprobs_BR, window.behaviour_BR, mask_BR
        )
    return policy_BR


def _token_values(
    tokens_N: Tensor, teacher: Callable[[slice], Tensor | TopK] | None, options: LossOptions
) -> Values:
    """What the streams need of a position: its token's log-probability and its divergence."""

    def values(logits_nV: Tensor, part: slice) -> list[Tensor]:
        logprobs_n = logprobs_of(logits_nV, tokens_N[part])
        if teacher is None:
            return [logprobs_n]
        return [
            logprobs_n,
            divergence(
                teacher(part),
                logits_nV,
                beta=options.beta,
                support=options.support,
                k=options.top_k,
                clip=options.pointwise_clip,
            ),
        ]

    return values


def _teacher(
    window: Window, where_BR: Tensor, head_VH: Tensor | None
) -> Callable[[slice], Tensor | TopK] | None:
    """The teacher at a slice of the positions that are true in ``where_BR``."""
    if window.teacher_ids_BRK is not None and window.teacher_BRK1 is not None:
        ids_NK, kept_NK1 = window.teacher_ids_BRK[where_BR], window.teacher_BRK1[where_BR]
        return lambda part: TopK(ids_NK[part], kept_NK1[part])
    if window.teacher_logits_BRV is not None:
        logits_NV = window.teacher_logits_BRV[where_BR].detach()
        return lambda part: logits_NV[part]
    if window.teacher_hidden_BRH is not None:
        if head_VH is None:
            raise ValueError(
                "window.teacher_hidden_BRH needs the head; call chunked_stream_loss or give "
                "teacher_logits_BRV"
            )
        hidden_NH = window.teacher_hidden_BRH[where_BR].detach()
        return lambda part: hidden_NH[part] @ head_VH.T
    return None
