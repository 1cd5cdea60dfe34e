"""REINFORCE with the batch's mean as its baseline (Williams, 1992)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sleeprl.algorithms.base import (
    Advantages,
    Algorithm,
    PolicyLossInputs,
    RewardBatch,
    batch_relative,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Reinforce(Algorithm):
    """The plain policy gradient. What is off-policy needs ``dreaming.importance_weight``."""

    loss_aggregation: str = "token"
    """See ``Algorithm.loss_aggregation``."""

    @property
    def has_ratio(self) -> bool:
        return False

    def advantages(self, rewards: RewardBatch) -> Advantages:
        return batch_relative(rewards, normalise=False)

    def surrogate(self, inputs: PolicyLossInputs) -> Tensor:
        return -inputs.advantages_BR * inputs.logprobs_BR
