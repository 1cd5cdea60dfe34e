"""RLOO (2402.14740): a text is one action, and its baseline what the others of its group got."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sleeprl.algorithms.base import Advantages, PolicyLossInputs, RewardBatch, by_group, clipped


@dataclass(frozen=True)
class RLOO:
    """On the policy that sampled, its gradient is A times that of the text's log-probability. The
    ratio of the whole text is clipped, for policies that differ."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    mean: str = "sequence"

    def advantages(self, scores: RewardBatch) -> Advantages:
        """A row that is alone in its group has no baseline: ``None``."""
        advantages: Advantages = [None] * len(scores.rewards)
        for rows in by_group(scores).values():
            total = sum(scores.rewards[row] or 0.0 for row in rows)
            for row in rows if len(rows) > 1 else ():
                own = scores.rewards[row] or 0.0
                advantages[row] = own - (total - own) / (len(rows) - 1)
        return advantages

    def surrogate(self, sampled: PolicyLossInputs) -> Tensor:
        log_ratio_B1 = sampled.sequence_log_ratio_B1().clamp(-20.0, 20.0)
        ratio_BR = log_ratio_B1.exp().expand_as(sampled.logprobs_BR)
        return clipped(ratio_BR, sampled.advantages_BR, self.clip_low, self.clip_high)
