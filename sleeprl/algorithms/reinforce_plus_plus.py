"""REINFORCE++ (2501.03262): the batch is the baseline and the scale, and PPO's clip holds the step."""

from __future__ import annotations

from dataclasses import dataclass

from sleeprl.algorithms.base import (
    Advantages,
    GroupClipped,
    RewardBatch,
    batch_relative,
    by_group,
)


@dataclass(frozen=True)
class ReinforcePlusPlus(GroupClipped):
    """group_baseline: take each group's mean off first (its "baseline" variant, for groups)."""

    mean: str = "token"
    group_baseline: bool = False

    def advantages(self, scores: RewardBatch) -> Advantages:
        rewards = list(scores.rewards)
        for rows in by_group(scores).values() if self.group_baseline else ():
            mean = sum(rewards[row] or 0.0 for row in rows) / len(rows)
            for row in rows:
                rewards[row] = (rewards[row] or 0.0) - mean
        centred = RewardBatch(rewards, scores.groups, scores.lengths, scores.limit)
        return batch_relative(centred, normalise=self.normalise)
