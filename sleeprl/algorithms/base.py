"""What an algorithm is, and the pieces that several are made of.

Shapes: B rows, R response positions. Log-probabilities are of the sampled tokens, in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Protocol

import torch
from torch import Tensor

SAME = 1e-8
"""Rewards that differ by less are equal."""
MEANS = ("token", "sequence", "constant")
Advantages = list[float | None]


@dataclass(frozen=True)
class RewardBatch:
    """A batch as the rewards see it.

    rewards: ``None`` is unscored, which is not 0. groups: rewards of the same are compared.
    lengths: response tokens. limit: the most that a response could have had.
    """

    rewards: Sequence[float | None]
    groups: Sequence[str]
    lengths: Sequence[int]
    limit: int


@dataclass(frozen=True)
class PolicyLossInputs:
    """What a surrogate is made of. logprobs_BR: of the current policy, with its gradient.
    proximal_BR: of the policy that the ratio is taken to, without. mask_BR: 1 on tokens that count."""

    logprobs_BR: Tensor
    proximal_BR: Tensor
    advantages_BR: Tensor
    mask_BR: Tensor

    def log_ratio_BR(self) -> Tensor:
        return (self.logprobs_BR - self.proximal_BR.detach()) * self.mask_BR

    def sequence_log_ratio_B1(self) -> Tensor:
        return self.log_ratio_BR().sum(-1, keepdim=True)

    def lengths_B1(self) -> Tensor:
        return self.mask_BR.sum(-1, keepdim=True).clamp_min(1)


class Algorithm(Protocol):
    """Pure: rewards to advantages, log-probabilities to a loss.

    mean: what the loss is a mean over: every ``token`` alike; every ``sequence`` alike, its
        tokens sharing its weight; or ``constant``, sequences with their tokens over the limit.
    It may have ``redraws``: dreaming then draws other groups for those without any advantage, for
    an update at most so many times its number of groups.
    """

    @property
    def mean(self) -> str: ...

    def advantages(self, scores: RewardBatch) -> Advantages:
        """One per row; ``None`` is a row that says nothing: no gradient, no zero to average with."""
        ...

    def surrogate(self, sampled: PolicyLossInputs) -> Tensor:
        """To be minimised, per token [B, R]."""
        ...


def by_group(scores: RewardBatch) -> dict[str, list[int]]:
    """The scored rows of each group."""
    members: dict[str, list[int]] = {}
    for row, (reward, group) in enumerate(zip(scores.rewards, scores.groups, strict=True)):
        if reward is not None:
            members.setdefault(group, []).append(row)
    return members


def group_relative(scores: RewardBatch, *, normalise: bool, skip_equal: bool = False) -> Advantages:
    """Reward minus its group's mean, with ``normalise`` over the group's deviation.

    A group with one scored row, or with equal rewards, teaches nothing: zeros, or with
    ``skip_equal`` none.
    """
    advantages: Advantages = [None] * len(scores.rewards)
    for rows in by_group(scores).values():
        for row, value in zip(rows, _centred(scores, rows, normalise), strict=True):
            advantages[row] = value
        if skip_equal and all(abs(advantages[row] or 0.0) <= SAME for row in rows):
            for row in rows:
                advantages[row] = None
    return advantages


def batch_relative(scores: RewardBatch, *, normalise: bool) -> Advantages:
    """The same over the whole batch; groups play no part."""
    rows = [row for row, reward in enumerate(scores.rewards) if reward is not None]
    advantages: Advantages = [None] * len(scores.rewards)
    for row, value in zip(rows, _centred(scores, rows, normalise), strict=True):
        advantages[row] = value
    return advantages


def _centred(scores: RewardBatch, rows: Sequence[int], normalise: bool) -> list[float]:
    rewards = [float(reward) for row in rows if (reward := scores.rewards[row]) is not None]
    mean = fmean(rewards) if rewards else 0.0
    centred = [reward - mean for reward in rewards]
    if not normalise:
        return centred
    deviation = stdev(rewards) if len(rewards) > 1 else 0.0
    return [value / deviation if deviation > SAME else 0.0 for value in centred]


def clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """PPO's objective, to be minimised: -min(ratio A, clip(ratio, 1 - low, 1 + high) A)."""
    bounded = ratio.clamp(1.0 - low, 1.0 + high)
    return -torch.minimum(ratio * advantages, bounded * advantages)


@dataclass(frozen=True)
class GroupClipped:
    """A group's relative reward and the clipped ratio of each token: GRPO and its next of kin.

    normalise: divide by the group's deviation. skip_equal: pass over a group whose rewards
    are all equal (DAPO's dynamic sampling, but for drawing another in its place).
    """

    normalise: bool = True
    clip_low: float = 0.2
    clip_high: float = 0.2
    mean: str = "sequence"
    skip_equal: bool = False

    def __post_init__(self) -> None:
        if self.mean not in MEANS:
            raise ValueError(f"mean={self.mean!r} must be one of {', '.join(MEANS)}")
        for name in ("clip_low", "clip_high"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")

    def advantages(self, scores: RewardBatch) -> Advantages:
        return group_relative(scores, normalise=self.normalise, skip_equal=self.skip_equal)

    def surrogate(self, sampled: PolicyLossInputs) -> Tensor:
        ratio_BR = sampled.log_ratio_BR().exp()
        return clipped(ratio_BR, sampled.advantages_BR, self.clip_low, self.clip_high)
