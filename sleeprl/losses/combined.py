"""One loss for all training: three terms over the parts of a batch.

Each row of a batch belongs to a *part* ("new", "replay", "imitation", "dream", ...). A part has a
weight for each term: ``pg`` (policy gradient), ``ce`` (cross-entropy) and ``kl`` (divergence from
the teacher). Each term of a part is a mean over that part's tokens in the whole, global batch. So
neither the lengths of the texts nor the split over ranks and micro-batches changes the objective.

``combined_loss`` takes logits, ``chunked_combined_loss`` takes hidden states and the head. The
loss, its gradient and the metrics are the same.

Shapes: B rows, R response positions, V vocabulary, H hidden, P parts, N unmasked positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from sleeprl.algorithms.base import CriticAlgorithm, PolicyLossInputs
from sleeprl.losses.chunked import Values, chunked_values
from sleeprl.losses.divergence import TopK, divergence, logprobs_of
from sleeprl.losses.off_policy import ImportanceWeight, mismatch_metrics
from sleeprl.losses.reference_kl import reference_kl
from sleeprl.losses.types import LossBatch, LossOptions, LossWeights


@dataclass(frozen=True)
class _ModelOutputs:
    """Outputs of a forward pass that the terms are computed from."""

    evaluate: Callable[[Tensor, Values, Sequence[bool]], Sequence[Tensor]]
    """Evaluates values [N] at the N positions where the mask [B, R] is true."""
    anchor: Tensor
    """Ties the loss to the graph when no row has a weight."""
    teacher_head_VH: Tensor | None = None
    """Language head of the teacher, for hidden states of the teacher."""
    critic_BR: Tensor | None = None
    """Values that the critic predicts, with their gradient."""


def token_counts(
    parts: Mapping[str, LossWeights],
    part_of: Sequence[str],
    lengths: Sequence[int],
    advantages: Sequence[Any] | None = None,
) -> Tensor:
    """Count the tokens and rows that the means of each part are taken over.

    Args:
        parts: Loss weights by name of the part.
        part_of: Part of each row.
        lengths: Response tokens of each row.
        advantages: Advantage of each row, ``None`` for rows without one. By default all rows have
            one.

    Returns:
        Counts [P, 3] in float64, in the order of ``parts``: response tokens (for ``ce`` and
        ``kl``), response tokens of rows with an advantage, and number of such rows (both for
        ``pg``).
    """
    names = list(parts)
    counts = torch.zeros(len(names), 3, dtype=torch.float64)
    for row, (name, length) in enumerate(zip(part_of, lengths, strict=True)):
        scored = length > 0 and (advantages is None or advantages[row] is not None)
        counts[names.index(name)] += torch.tensor([length, length * scored, scored])
    return counts


def add_metrics(totals: dict[str, float], share: Mapping[str, float]) -> None:
    """Add the metrics of a micro-batch or a rank to ``totals``, in place.

    Keys that end in ``/max`` take the maximum; all others are summed.
    """
    for key, value in share.items():
        old = totals.get(key)
        if old is None:
            totals[key] = value
        else:
            totals[key] = max(old, value) if key.endswith("/max") else old + value


def combined_loss(
    logits_BRV: Tensor,
    batch: LossBatch,
    parts: Mapping[str, LossWeights],
    counts_P3: Tensor,
    options: LossOptions,
) -> tuple[Tensor, dict[str, float]]:
    """Compute a micro-batch's share of the loss, and of each mean as ``part/term``.

    Args:
        logits_BRV: The student's logits at the positions that predict the response.
        batch: The micro-batch.
        parts: Loss weights by name of the part.
        counts_P3: ``token_counts`` of the *global* batch.
        options: Settings of the terms.

    Returns:
        The loss, a scalar, and metrics. Summed over micro-batches and ranks (metrics with
        ``add_metrics``) they give the global means.

    Raises:
        ValueError: The batch lacks what a term needs, such as the reference's log-probabilities.
    """
    outputs = _ModelOutputs(
        lambda where_BR, values, _: values(logits_BRV[where_BR], slice(None)), logits_BRV
    )
    return _combine_terms(outputs, batch, parts, counts_P3, options)


def chunked_combined_loss(  # parameters: model outputs, objective and memory options
    hidden_BRH: Tensor,
    head_VH: Tensor,
    batch: LossBatch,
    parts: Mapping[str, LossWeights],
    counts_P3: Tensor,
    options: LossOptions,
    *,
    teacher_head_VH: Tensor | None = None,
    critic_BR: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Compute ``combined_loss`` of ``hidden_BRH @ head_VH.T`` without materialising all logits.

    Args:
        hidden_BRH: The student's last hidden states at the positions that predict the response.
            Padding is not projected.
        head_VH: Weight of the student's language head.
        batch: The micro-batch.
        parts: Loss weights by name of the part.
        counts_P3: ``token_counts`` of the *global* batch.
        options: Settings of the terms.
        teacher_head_VH: Head for ``batch.teacher_hidden_BRH``. By default the student's head,
            without gradient.
        critic_BR: Values that the critic predicts, with their gradient.
        chunk: Positions per chunk, see ``chunked_values``. It changes the memory used, not the
            result.

    Returns:
        The loss, a scalar, and metrics, as ``combined_loss``.

    Raises:
        ValueError: The batch lacks what a term needs, such as the reference's log-probabilities.
    """
    outputs = _ModelOutputs(
        lambda where_BR, values, differentiable: chunked_values(
            hidden_BRH[where_BR], head_VH, values, differentiable, chunk=chunk
        ),
        hidden_BRH,
        (head_VH if teacher_head_VH is None else teacher_head_VH).detach(),
        critic_BR,
    )
    return _combine_terms(outputs, batch, parts, counts_P3, options)


def _combine_terms(
    outputs: _ModelOutputs,
    batch: LossBatch,
    parts: Mapping[str, LossWeights],
    counts_P3: Tensor,
    options: LossOptions,
) -> tuple[Tensor, dict[str, float]]:
    """Sum the weighted terms of all parts, and record each mean."""
    critic_BR = outputs.critic_BR
    loss = outputs.anchor.sum() * 0.0
    if critic_BR is not None:
        loss = loss + critic_BR.sum() * 0.0
    metrics: dict[str, float] = {}
    for index, (name, weight) in enumerate(parts.items()):
        members = [part == name for part in batch.part]
        count, scored, rows = counts_P3[index].tolist()
        if not any(members) or count == 0:
            continue
        mask_BR = batch.mask_BR * torch.tensor(members, device=batch.mask_BR.device)[:, None]
        where_BR = mask_BR != 0
        teacher = _teacher_at(batch, where_BR, outputs.teacher_head_VH) if weight.kl else None
        values = _token_values(batch.tokens_BR[where_BR], teacher, options)
        differentiable = [bool(weight.ce or weight.pg)] + [True] * (teacher is not None)
        logprobs_BR, *divergence_BR = (
            found_N.new_zeros(where_BR.shape).masked_scatter(where_BR, found_N)
            for found_N in outputs.evaluate(where_BR, values, differentiable)
        )
        token_weight_BR = mask_BR / count
        terms = {"ce": (weight.ce, -logprobs_BR, token_weight_BR)}
        if divergence_BR:
            terms["kl"] = (weight.kl, divergence_BR[0], token_weight_BR)
        if weight.pg and scored:
            scored_BR = mask_BR * ~batch.advantages_BR.isnan()
            policy_BR = _policy_loss(logprobs_BR, scored_BR, batch, options)
            terms["pg"] = (weight.pg, policy_BR, _pg_weights(scored_BR, scored, rows, options))
            if critic_BR is not None and batch.values_BR is not None:
                factor, squared_BR = _value_loss(critic_BR, batch, options)
                terms["value"] = (weight.pg * factor, squared_BR, scored_BR / scored)
            distances = _distances(logprobs_BR, mask_BR, batch, options.importance_weight)
            for key, found_BR in distances.items():
                metrics[f"{name}/{key}"] = float((found_BR * token_weight_BR).sum())
            for key, figure in _agreement(logprobs_BR, token_weight_BR, batch).items():
                metrics[f"{name}/{key}"] = figure
        for term, (factor, found_BR, weights_BR) in terms.items():
            mean = (found_BR * weights_BR).sum()
            metrics[f"{name}/{term}"] = float(mean.detach())
            if factor:
                loss = loss + factor * mean
    return loss, metrics


def _policy_loss(
    logprobs_BR: Tensor, mask_BR: Tensor, batch: LossBatch, options: LossOptions
) -> Tensor:
    """Return the ``pg`` loss per token [B, R]: surrogate, importance weight and KL to the reference."""
    correction = options.importance_weight
    corrected = correction.level != "off"
    advantages_BR = batch.advantages_BR.nan_to_num().expand_as(logprobs_BR)
    proximal_BR = logprobs_BR.detach() if corrected else batch.rollout_logprobs_BR
    policy_BR = options.algorithm.surrogate(
        PolicyLossInputs(logprobs_BR, proximal_BR, advantages_BR, mask_BR)
    )
    if corrected:
        weights_BR = correction.weights(logprobs_BR, batch.rollout_logprobs_BR, mask_BR)
        policy_BR = policy_BR * weights_BR
    if options.reference_kl:
        if batch.reference_logprobs_BR is None:
            raise ValueError(
                f"a KL to the reference (weight {options.reference_kl}) needs the reference's "
                "log-probabilities of every row"
            )
        kl_BR = reference_kl(logprobs_BR, batch.reference_logprobs_BR, options.reference_estimator)
        policy_BR = policy_BR + options.reference_kl * kl_BR
    return policy_BR


def _pg_weights(scored_BR: Tensor, tokens: float, rows: float, options: LossOptions) -> Tensor:
    """Return the weight of each token in the ``pg`` term, [B, R].

    The weights sum to 1 over the global batch. With a ``constant`` mean they do so only if all
    responses have the maximum length.
    """
    aggregation = options.algorithm.loss_aggregation
    if aggregation == "token":
        return scored_BR / tokens
    if aggregation == "constant":
        return scored_BR / (rows * options.max_response_tokens)
    return scored_BR / scored_BR.sum(-1, keepdim=True).clamp_min(1) / rows


def _value_loss(critic_BR: Tensor, batch: LossBatch, options: LossOptions) -> tuple[float, Tensor]:
    """Return the weight of the critic's loss, and that loss per token [B, R]."""
    assert batch.values_BR is not None and batch.returns_BR is not None
    algorithm = options.algorithm
    if not algorithm.needs_critic:
        raise ValueError(f"{type(algorithm).__name__} has no critic, but the batch has its values")
    critic = cast(CriticAlgorithm, algorithm)
    return critic.value_weight, critic.value_loss(critic_BR, batch.values_BR, batch.returns_BR)


def _distances(
    logprobs_BR: Tensor, mask_BR: Tensor, batch: LossBatch, correction: ImportanceWeight
) -> dict[str, Tensor]:
    """Measure per token [B, R] how far the policy is from the sampling policy and from the reference.

    The metrics are recorded even if the correction is off.
    """
    sampled = logprobs_BR, batch.rollout_logprobs_BR, mask_BR
    found = mismatch_metrics(logprobs_BR, batch.rollout_logprobs_BR)
    found["weight_mean"] = correction.weights(*sampled)
    found["outside"] = correction.outside(*sampled)
    if batch.reference_logprobs_BR is not None:
        found["reference_kl"] = reference_kl(
            logprobs_BR.detach(), batch.reference_logprobs_BR, "k3"
        )
    return found


def _agreement(logprobs_BR: Tensor, token_weight_BR: Tensor, batch: LossBatch) -> dict[str, float]:
    """Compare the trainer's log-probabilities with those of the sampling policy, by age.

    Returns for each age the share of its tokens, and the weighted sum (``apart``) and the maximum
    of the absolute differences, in nats.
    """
    apart_BR = (logprobs_BR.detach() - batch.rollout_logprobs_BR).abs() * (token_weight_BR != 0)
    found = {}
    for age in sorted({age for age in batch.age if age is not None}):
        own_B1 = torch.tensor([[each == age] for each in batch.age], device=token_weight_BR.device)
        found[f"age_{age}/share"] = float((token_weight_BR * own_B1).sum())
        found[f"age_{age}/apart"] = float((apart_BR * token_weight_BR * own_B1).sum())
        found[f"age_{age}/max"] = float((apart_BR * own_B1).max())
    return found


def _token_values(
    tokens_N: Tensor, teacher: Callable[[slice], Tensor | TopK] | None, options: LossOptions
) -> Values:
    """Return a function for the log-probability and divergence of each position [n], in nats."""

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


def _teacher_at(
    batch: LossBatch, where_BR: Tensor, head_VH: Tensor | None
) -> Callable[[slice], Tensor | TopK] | None:
    """Return a function for the teacher's distribution on a slice of the true positions of ``where_BR``."""
    if batch.teacher_ids_BRK is not None and batch.teacher_logprobs_BRK1 is not None:
        ids_NK = batch.teacher_ids_BRK[where_BR]
        logprobs_NK1 = batch.teacher_logprobs_BRK1[where_BR]
        return lambda part: TopK(ids_NK[part], logprobs_NK1[part])
    if batch.teacher_logits_BRV is not None:
        logits_NV = batch.teacher_logits_BRV[where_BR].detach()
        return lambda part: logits_NV[part]
    if batch.teacher_hidden_BRH is not None:
        if head_VH is None:
            raise ValueError(
                "batch.teacher_hidden_BRH needs the head; call chunked_combined_loss or give "
                "teacher_logits_BRV"
            )
        hidden_NH = batch.teacher_hidden_BRH[where_BR].detach()
        return lambda part: hidden_NH[part] @ head_VH.T
    return None
