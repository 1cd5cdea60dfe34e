"""One loss for everything that learns: three streams over the parts of a batch.

A row of a batch belongs to a *part* ("new", "replay", "imitation", "dream", ...).
A part has a weight for each stream: ``pg`` (policy gradient), ``ce``
(cross-entropy) and ``kl`` (divergence from the teacher). Each stream of a part is
a mean over that part's tokens in the whole, global batch, so neither the length
of texts nor the split over ranks and micro-batches changes the objective.

``combined_loss`` takes logits, ``chunked_combined_loss`` hidden states and the head; the
loss, its gradient and the metrics are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sleeprl.algorithms.base import Algorithm, PolicyLossInputs
from sleeprl.algorithms.dapo import DAPO
from sleeprl.algorithms.ppo import PPO
from sleeprl.losses.chunked import Values, chunked_values
from sleeprl.losses.divergence import TopK, divergence, logprobs_of
from sleeprl.losses.off_policy import ImportanceWeight, mismatch_metrics
from sleeprl.losses.reference_kl import reference_kl


@dataclass(frozen=True)
class LossWeights:
    """Weights of the three streams for the rows of one part.

    quiet: weight of how loud the newborn expert is on the part's tokens, the prompts' too
        (``experts.Listener``). It is no stream of the logits: the learner adds it.
    """

    pg: float = 0.0
    ce: float = 0.0
    kl: float = 0.0
    quiet: float = 0.0


@dataclass(frozen=True)
class LossOptions:
    """beta, support, top_k, pointwise_clip: of the ``kl`` stream, see ``divergence``.

    policy: of the ``pg`` stream. limit: the most response tokens there can be, for its mean
        ``constant``.
    correction: for texts of another policy. The ratio of ``policy`` is then taken to the
        current one, where it is 1 in value and not in gradient, and the correction weighs
        the token (the decoupled objective, 2505.24298, with one step per batch). ``off``
        takes the ratio to the policy that sampled, which the algorithm itself bounds.
    reference, reference_estimator: weight and kind of the KL to the reference policy.
    """

    beta: float = 0.0
    top_k: int = 32
    support: str = "teacher"
    pointwise_clip: float | None = None
    policy: Algorithm = DAPO()
    limit: int = 0
    correction: ImportanceWeight = ImportanceWeight()
    reference: float = 0.0
    reference_estimator: str = "k3"

    def __post_init__(self) -> None:
        if self.policy.mean == "constant" and self.limit <= 0:
            raise ValueError(f"limit={self.limit} must be positive for a mean over a constant")


@dataclass
class LossBatch:
    """What the loss needs of B rows, padded to R response tokens.

    tokens_BR: sampled ids. mask_BR: 1 on response tokens. part: name per row.
    advantages_BR, behaviour_BR: for ``pg`` rows; [B, 1] where all tokens of a row share one.
        An advantage that is NaN is none: the ``pg`` stream passes over the row, which is
        not a zero to average with.
    age: of each row, by how many versions the oldest weights in it trail the learner's, or None.
    reference_BR: log-probabilities of the reference policy. values_BR, returns_BR: of the critic
        before the step, and what it is to learn.
    The teacher of the ``kl`` stream is one of: teacher_ids_BRK and teacher_BRK1, its
    top-k ids and k+1 log-probabilities; teacher_logits_BRV; or, for
    ``chunked_combined_loss``, teacher_hidden_BRH.
    """

    tokens_BR: Tensor
    mask_BR: Tensor
    part: Sequence[str]
    advantages_BR: Tensor
    behaviour_BR: Tensor
    age: Sequence[int | None] = ()
    reference_BR: Tensor | None = None
    values_BR: Tensor | None = None
    returns_BR: Tensor | None = None
    teacher_ids_BRK: Tensor | None = None
    teacher_BRK1: Tensor | None = None
    teacher_logits_BRV: Tensor | None = None
    teacher_hidden_BRH: Tensor | None = None


def token_counts(
    parts: Mapping[str, LossWeights],
    part_of: Sequence[str],
    lengths: Sequence[int],
    advantages: Sequence[Any] | None = None,
) -> Tensor:
    """What the means of each part are over, [P, 3] float64, in the order of ``parts``.

    Its response tokens, over which ``ce`` and ``kl`` are means; and, for ``pg``, the tokens and
    the number of rows that have an advantage (not ``None``). By default all rows have one.
    """
    names = list(parts)
    counts = torch.zeros(len(names), 3, dtype=torch.float64)
    for row, (name, length) in enumerate(zip(part_of, lengths, strict=True)):
        scored = length > 0 and (advantages is None or advantages[row] is not None)
        counts[names.index(name)] += torch.tensor([length, length * scored, scored])
    return counts


def add_metrics(totals: dict[str, float], share: Mapping[str, float]) -> None:
    """Add a micro-batch's or a rank's share of the metrics; of a ``/max`` the largest counts."""
    for key, value in share.items():
        old = totals.get(key)
        if old is None:
            totals[key] = value
        else:
            totals[key] = max(old, value) if key.endswith("/max") else old + value


def combined_loss(
    logits_BRV: Tensor,
    window: LossBatch,
    parts: Mapping[str, LossWeights],
    counts_P3: Tensor,
    options: LossOptions,
) -> tuple[Tensor, dict[str, float]]:
    """This micro-batch's share of the loss, and of each mean as ``part/stream``.

    counts_P3: ``token_counts`` of the *global* batch. Summing the returned loss over
    micro-batches and ranks, and the metrics with ``add_metrics``, gives the means.
    """

    return _streams(
        lambda where_BR, values, _: values(logits_BRV[where_BR], slice(None)),
        logits_BRV,
        window,
        parts,
        counts_P3,
        options,
    )


def chunked_combined_loss(
    hidden_BRH: Tensor,
    head_VH: Tensor,
    window: LossBatch,
    parts: Mapping[str, LossWeights],
    counts_P3: Tensor,
    options: LossOptions,
    *,
    teacher_head_VH: Tensor | None = None,
    critic_BR: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """``combined_loss`` of the logits ``hidden_BRH @ head_VH.T``, which are never there as a whole.

    hidden_BRH: the student's last hidden states at the positions that predict the
        response. Padding is not projected.
    teacher_head_VH: of a ``window.teacher_hidden_BRH``; by default the student's head,
        without gradient.
    critic_BR: the values that a critic gives now, with their gradient.
    chunk: see ``chunked_values``; it changes the memory used, not the result.
    """
    return _streams(
        lambda where_BR, values, differentiable: chunked_values(
            hidden_BRH[where_BR], head_VH, values, differentiable, chunk=chunk
        ),
        hidden_BRH,
        window,
        parts,
        counts_P3,
        options,
        (head_VH if teacher_head_VH is None else teacher_head_VH).detach(),
        critic_BR,
    )


def _streams(
    evaluate: Callable[[Tensor, Values, Sequence[bool]], Sequence[Tensor]],
    anchor: Tensor,
    window: LossBatch,
    parts: Mapping[str, LossWeights],
    counts_P3: Tensor,
    options: LossOptions,
    teacher_head_VH: Tensor | None = None,
    critic_BR: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """evaluate: gives the values [N] of the N positions that are true in its mask [B, R]."""
    loss = anchor.sum() * 0.0  # keeps the graph whole when no row has weight
    if critic_BR is not None:
        loss = loss + critic_BR.sum() * 0.0
    metrics: dict[str, float] = {}
    for index, (name, weight) in enumerate(parts.items()):
        members = [part == name for part in window.part]
        count, scored, rows = counts_P3[index].tolist()
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
        even_BR = mask_BR / count
        streams = {"ce": (weight.ce, -logprobs_BR, even_BR)}
        if divergence_BR:
            streams["kl"] = (weight.kl, divergence_BR[0], even_BR)
        if weight.pg and scored:
            scored_BR = mask_BR * ~window.advantages_BR.isnan()
            policy_BR = _policy(logprobs_BR, scored_BR, window, options)
            streams["pg"] = (weight.pg, policy_BR, _weights(scored_BR, scored, rows, options))
            if critic_BR is not None and window.values_BR is not None:
                assert isinstance(options.policy, PPO) and window.returns_BR is not None
                squared_BR = options.policy.value_loss(
                    critic_BR, window.values_BR, window.returns_BR
                )
                factor = weight.pg * options.policy.value_weight
                streams["value"] = (factor, squared_BR, scored_BR / scored)
            distances = _distances(logprobs_BR, mask_BR, window, options.correction)
            for key, found_BR in distances.items():
                metrics[f"{name}/{key}"] = float((found_BR * even_BR).sum())
            for key, figure in _agreement(logprobs_BR, even_BR, window).items():
                metrics[f"{name}/{key}"] = figure
        for stream, (factor, found_BR, weights_BR) in streams.items():
            mean = (found_BR * weights_BR).sum()
            metrics[f"{name}/{stream}"] = float(mean.detach())
            if factor:
                loss = loss + factor * mean
    return loss, metrics


def _policy(
    logprobs_BR: Tensor, mask_BR: Tensor, window: LossBatch, options: LossOptions
) -> Tensor:
    corrected = options.correction.level != "off"
    advantages_BR = window.advantages_BR.nan_to_num().expand_as(logprobs_BR)
    proximal_BR = logprobs_BR.detach() if corrected else window.behaviour_BR
    policy_BR = options.policy.surrogate(
        PolicyLossInputs(logprobs_BR, proximal_BR, advantages_BR, mask_BR)
    )
    if corrected:
        weights_BR = options.correction.weights(logprobs_BR, window.behaviour_BR, mask_BR)
        policy_BR = policy_BR * weights_BR
    if options.reference:
        if window.reference_BR is None:
            raise ValueError(
                f"a KL to the reference (weight {options.reference}) needs the reference's "
                "log-probabilities of every row"
            )
        kl_BR = reference_kl(logprobs_BR, window.reference_BR, options.reference_estimator)
        policy_BR = policy_BR + options.reference * kl_BR
    return policy_BR


def _weights(scored_BR: Tensor, tokens: float, rows: float, options: LossOptions) -> Tensor:
    """What each token counts in the ``pg`` stream; they add up to 1 over the global batch, but for
    a ``constant`` mean, where only texts of the full length would."""
    if options.policy.mean == "token":
        return scored_BR / tokens
    if options.policy.mean == "constant":
        return scored_BR / (rows * options.limit)
    return scored_BR / scored_BR.sum(-1, keepdim=True).clamp_min(1) / rows


def _distances(
    logprobs_BR: Tensor, mask_BR: Tensor, window: LossBatch, correction: ImportanceWeight
) -> dict[str, Tensor]:
    """From the policy that sampled, what the correction makes of that, and from the reference where
    it was asked; always recorded, also with the correction off."""
    sampled = logprobs_BR, window.behaviour_BR, mask_BR
    found = mismatch_metrics(logprobs_BR, window.behaviour_BR)
    found["weight_mean"] = correction.weights(*sampled)
    found["outside"] = correction.outside(*sampled)
    if window.reference_BR is not None:
        found["reference_kl"] = reference_kl(logprobs_BR.detach(), window.reference_BR, "k3")
    return found


def _agreement(logprobs_BR: Tensor, even_BR: Tensor, window: LossBatch) -> dict[str, float]:
    """How far the learner's log-probabilities are from those of the policy that sampled, by the
    rows' age: sum and largest of the tokens' absolute differences, and their share of all."""
    apart_BR = (logprobs_BR.detach() - window.behaviour_BR).abs() * (even_BR != 0)
    found = {}
    for age in sorted({age for age in window.age if age is not None}):
        mine_B1 = torch.tensor([[each == age] for each in window.age], device=even_BR.device)
        found[f"age_{age}/share"] = float((even_BR * mine_B1).sum())
        found[f"age_{age}/apart"] = float((apart_BR * even_BR * mine_B1).sum())
        found[f"age_{age}/max"] = float((apart_BR * mine_B1).max())
    return found


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
    window: LossBatch, where_BR: Tensor, head_VH: Tensor | None
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
