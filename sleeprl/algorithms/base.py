"""Define what a policy-gradient algorithm is, and the pieces that several are made of.

Shapes: B rows, R response positions. Log-probabilities are of the sampled tokens, in nats.
Imports no torch, so that a configuration can be checked against an algorithm's flags at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

SAME = 1e-8
"""Rewards that differ by no more are equal."""
LOSS_AGGREGATIONS = ("token", "sequence", "constant")
Advantages = list[float | None]
"""One per row of a batch; ``None`` is a row without a gradient."""


@dataclass(frozen=True)
class RewardBatch:
    """A batch of N responses as an algorithm's advantages see it."""

    rewards: Sequence[float | None]
    """One per response [N]. ``None`` is unscored, which is not 0."""
    groups: Sequence[str]
    """Name of each response's group [N]: those that answer the same prompt."""
    lengths: Sequence[int]
    """Tokens of each response [N]."""
    max_response_tokens: int
    """Most tokens that a response could have had."""


@dataclass(frozen=True)
class PolicyLossInputs:
    """What a surrogate loss is made of, for B rows of R positions."""

    logprobs_BR: Tensor
    """Of the current policy, with its gradient."""
    proximal_BR: Tensor
    """Of the policy that the ratio is taken to, without gradient."""
    advantages_BR: Tensor
    """What is learned from each token."""
    mask_BR: Tensor
    """1 on tokens that count."""

    def log_ratio_BR(self) -> Tensor:
        return (self.logprobs_BR - self.proximal_BR.detach()) * self.mask_BR

    def sequence_log_ratio_B1(self) -> Tensor:
        return self.log_ratio_BR().sum(-1, keepdim=True)

    def lengths_B1(self) -> Tensor:
        return self.mask_BR.sum(-1, keepdim=True).clamp_min(1)


class Algorithm(Protocol):
    """Turn rewards into advantages, and log-probabilities into a loss. Pure.

    A class that inherits from this protocol has the flags' defaults and only names those that
    differ.
    """

    @property
    def loss_aggregation(self) -> str:
        """What the loss is a mean over.

        ``token``: every token alike. ``sequence``: every sequence alike, its tokens share its
        weight. ``constant``: sequences, each token over the most tokens of a response.
        """
        return "token"

    @property
    def needs_critic(self) -> bool:
        """Whether it learns from a value head; then it is a ``CriticAlgorithm``."""
        return False

    @property
    def compares_within_group(self) -> bool:
        """Whether an advantage is relative to a group; one response alone then teaches nothing."""
        return False

    @property
    def has_ratio(self) -> bool:
        """Whether its surrogate has a ratio to the policy that sampled, which bounds staleness."""
        return True

    @property
    def max_resample_rounds(self) -> int:
        """How many groups may be replaced because they are not informative, as a multiple of an
        update's groups; dreaming then draws others."""
        return 0

    def advantages(self, rewards: RewardBatch) -> Advantages:
        """Return one advantage per row; ``None`` is no gradient and no zero to average with."""
        ...

    def is_informative(self, rewards: RewardBatch) -> bool:
        """Return whether these responses, whole groups, would give any gradient. Cheap."""
        return any(reward is not None for reward in rewards.rewards)

    def surrogate(self, inputs: PolicyLossInputs) -> Tensor:
        """Return what is to be minimised, per token [B, R]."""
        ...


class CriticAlgorithm(Algorithm, Protocol):
    """An algorithm with a critic: the advantages come from the values that it gives each token."""

    @property
    def needs_critic(self) -> bool:
        return True

    @property
    def value_weight(self) -> float:
        """Weight of the critic's loss beside the policy's."""
        return 0.5

    def advantages(self, rewards: RewardBatch) -> Advantages:
        """Return the rewards themselves, which ``estimate_advantages`` starts from."""
        return list(rewards.rewards)

    def estimate_advantages(
        self, rewards: Sequence[float | None], values: Sequence[Sequence[float]]
    ) -> tuple[list[list[float] | None], list[list[float]]]:
        """Return the advantages and the returns of every token.

        Args:
            rewards: One per response, paid at its last token. ``None`` gives no advantages, and
                returns that are the values themselves, from which the critic learns nothing.
            values: The critic's value at each response token, before the step.
        """
        ...

    def value_loss(self, values_BR: Tensor, old_BR: Tensor, returns_BR: Tensor) -> Tensor:
        """Return the critic's loss per token [B, R]: half the squared error.

        Args:
            values_BR: What the critic gives now, with its gradient.
            old_BR: What it gave before the step.
            returns_BR: What it is to learn.
        """
        return 0.5 * (values_BR - returns_BR) ** 2


def rows_by_group(rewards: RewardBatch) -> dict[str, list[int]]:
    """Return the scored rows of each group."""
    members: dict[str, list[int]] = {}
    for row, (reward, group) in enumerate(zip(rewards.rewards, rewards.groups, strict=True)):
        if reward is not None:
            members.setdefault(group, []).append(row)
    return members


def differs_within_group(rewards: RewardBatch) -> bool:
    """Return whether two responses of any one group have different rewards."""
    for rows in rows_by_group(rewards).values():
        own = [reward for row in rows if (reward := rewards.rewards[row]) is not None]
        if max(own) - min(own) > SAME:
            return True
    return False


def group_relative(
    rewards: RewardBatch, *, normalise: bool, filter_zero_std: bool = False
) -> Advantages:
    """Return each reward minus its group's mean, with ``normalise`` over the group's deviation.

    A group with one scored row, or with equal rewards, teaches nothing: its advantages are zero,
    or with ``filter_zero_std`` there are none.
    """
    advantages: Advantages = [None] * len(rewards.rewards)
    for rows in rows_by_group(rewards).values():
        for row, value in zip(rows, _centre(rewards, rows, normalise), strict=True):
            advantages[row] = value
        if filter_zero_std and all(abs(advantages[row] or 0.0) <= SAME for row in rows):
            for row in rows:
                advantages[row] = None
    return advantages


def batch_relative(rewards: RewardBatch, *, normalise: bool) -> Advantages:
    """Return each reward minus the batch's mean, with ``normalise`` over its deviation."""
    rows = [row for row, reward in enumerate(rewards.rewards) if reward is not None]
    advantages: Advantages = [None] * len(rewards.rewards)
    for row, value in zip(rows, _centre(rewards, rows, normalise), strict=True):
        advantages[row] = value
    return advantages


def _centre(batch: RewardBatch, rows: Sequence[int], normalise: bool) -> list[float]:
    rewards = [float(reward) for row in rows if (reward := batch.rewards[row]) is not None]
    mean = fmean(rewards) if rewards else 0.0
    centred = [reward - mean for reward in rewards]
    if not normalise:
        return centred
    deviation = stdev(rewards) if len(rewards) > 1 else 0.0
    return [value / deviation if deviation > SAME else 0.0 for value in centred]


def clipped_loss(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Return PPO's objective, to be minimised: -min(ratio A, clip(ratio, 1 - low, 1 + high) A)."""
    bounded = ratio.clamp(1.0 - low, 1.0 + high)
    return -(ratio * advantages).minimum(bounded * advantages)


@dataclass(frozen=True)
class GroupClipped(Algorithm):
    """A group's relative reward and the clipped ratio of each token: GRPO and its next of kin."""

    normalise: bool = True
    """Divide by the group's deviation."""
    clip_low: float = 0.2
    """How far below 1 a ratio counts."""
    clip_high: float = 0.2
    """How far above 1 a ratio counts."""
    loss_aggregation: str = "sequence"
    """See ``Algorithm.loss_aggregation``."""
    filter_zero_std: bool = False
    """Pass over a group whose rewards are all equal."""

    def __post_init__(self) -> None:
        if self.loss_aggregation not in LOSS_AGGREGATIONS:
            known = ", ".join(LOSS_AGGREGATIONS)
            raise ValueError(f"loss_aggregation={self.loss_aggregation!r} must be one of {known}")
        for name in ("clip_low", "clip_high"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")

    @property
    def compares_within_group(self) -> bool:
        return True

    def advantages(self, rewards: RewardBatch) -> Advantages:
        return group_relative(
            rewards, normalise=self.normalise, filter_zero_std=self.filter_zero_std
        )

    def is_informative(self, rewards: RewardBatch) -> bool:
        return differs_within_group(rewards)

    def surrogate(self, inputs: PolicyLossInputs) -> Tensor:
        ratio_BR = inputs.log_ratio_BR().exp()
        return clipped_loss(ratio_BR, inputs.advantages_BR, self.clip_low, self.clip_high)
