"""RLOO (2402.14740): a text is one action, and its baseline what the others of its group got."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sleeprl.algorithms.base import (
    Advantages,
    Algorithm,
    PolicyLossInputs,
    RewardBatch,
    clipped_loss,
    differs_within_group,
    rows_by_group,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RLOO(Algorithm):
    """Leave-one-out advantages with the clipped ratio of the whole text.

    On the policy that sampled, the gradient is A times that of the text's log-probability.
    """

    clip_low: float = 0.2
    """How far below 1 a ratio counts."""
    clip_high: float = 0.2
    """How far above 1 a ratio counts."""
    loss_aggregation: str = "sequence"
    """See ``Algorithm.loss_aggregation``."""

    @property
    def compares_within_group(self) -> bool:
        return True

    def advantages(self, rewards: RewardBatch) -> Advantages:
        """Return ``None`` for a row that is alone in its group, since it has no baseline."""
        values = rewards.rewards
        advantages: Advantages = [None] * len(values)
        for rows in rows_by_group(rewards).values():
            total = sum(values[row] or 0.0 for row in rows)
            for row in rows if len(rows) > 1 else ():
                own = values[row] or 0.0
                advantages[row] = own - (total - own) / (len(rows) - 1)
        return advantages

    def is_informative(self, rewards: RewardBatch) -> bool:
        return differs_within_group(rewards)

    def surrogate(self, inputs: PolicyLossInputs) -> Tensor:
        log_ratio_B1 = inputs.sequence_log_ratio_B1().clamp(-20.0, 20.0)
        ratio_BR = log_ratio_B1.exp().expand_as(inputs.logprobs_BR)
        return clipped_loss(ratio_BR, inputs.advantages_BR, self.clip_low, self.clip_high)
