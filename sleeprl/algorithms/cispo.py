"""CISPO (2506.13585, eq. 4): the ratio is capped and only weighs; no token loses its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sleeprl.algorithms.base import (
    Advantages,
    Algorithm,
    PolicyLossInputs,
    RewardBatch,
    differs_within_group,
    group_relative,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CISPO(Algorithm):
    """Weigh the log-probability of each token by its ratio, without gradient."""

    normalise: bool = True
    """Divide by the group's deviation."""
    max_ratio: float = 5.0
    """Most that a token weighs."""
    loss_aggregation: str = "token"
    """See ``Algorithm.loss_aggregation``."""

    @property
    def compares_within_group(self) -> bool:
        return True

    def advantages(self, rewards: RewardBatch) -> Advantages:
        return group_relative(rewards, normalise=self.normalise)

    def is_informative(self, rewards: RewardBatch) -> bool:
        return differs_within_group(rewards)

    def surrogate(self, inputs: PolicyLossInputs) -> Tensor:
        weight_BR = inputs.log_ratio_BR().exp().clamp(max=self.max_ratio).detach()
        return -weight_BR * inputs.advantages_BR * inputs.logprobs_BR
