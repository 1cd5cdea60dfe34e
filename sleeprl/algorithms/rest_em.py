"""ReST-EM (2312.06585): keep what was good enough, and learn it by heart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sleeprl.algorithms.base import Advantages, Algorithm, PolicyLossInputs, RewardBatch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RestEM(Algorithm):
    """The cross-entropy of responses whose reward is above a threshold."""

    threshold: float = 0.0
    """Rewards above it are learned from."""
    loss_aggregation: str = "token"
    """See ``Algorithm.loss_aggregation``."""

    @property
    def has_ratio(self) -> bool:
        return False

    def advantages(self, rewards: RewardBatch) -> Advantages:
        return [
            1.0 if reward is not None and reward > self.threshold else None
            for reward in rewards.rewards
        ]

    def is_informative(self, rewards: RewardBatch) -> bool:
        return any(reward is not None and reward > self.threshold for reward in rewards.rewards)

    def surrogate(self, inputs: PolicyLossInputs) -> Tensor:
        return -inputs.advantages_BR * inputs.logprobs_BR
