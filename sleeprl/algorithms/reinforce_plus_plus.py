"""REINFORCE++ (2501.03262): the batch is the baseline and the scale, and PPO's clip the bound."""

from __future__ import annotations

from dataclasses import dataclass

from sleeprl.algorithms.base import (
    Advantages,
    GroupClipped,
    RewardBatch,
    batch_relative,
    differs_within_group,
    rows_by_group,
)


@dataclass(frozen=True)
class ReinforcePlusPlus(GroupClipped):
    """Advantages over the whole batch, with each token's clipped ratio."""

    loss_aggregation: str = "token"
    """See ``Algorithm.loss_aggregation``."""
    group_baseline: bool = False
    """Take each group's mean off first (its "baseline" variant, for groups)."""

    @property
    def compares_within_group(self) -> bool:
        return self.group_baseline

    def advantages(self, rewards: RewardBatch) -> Advantages:
        values = list(rewards.rewards)
        for rows in rows_by_group(rewards).values() if self.group_baseline else ():
            mean = sum(values[row] or 0.0 for row in rows) / len(rows)
            for row in rows:
                values[row] = (values[row] or 0.0) - mean
        centred = RewardBatch(values, rewards.groups, rewards.lengths, rewards.max_response_tokens)
        return batch_relative(centred, normalise=self.normalise)

    def is_informative(self, rewards: RewardBatch) -> bool:
        if self.group_baseline:
            return differs_within_group(rewards)
        return any(reward is not None for reward in rewards.rewards)
