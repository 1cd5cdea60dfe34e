"""ReST-EM (2312.06585): keep what was good enough, and learn it by heart."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sleeprl.algorithms.base import Advantages, PolicyLossInputs, RewardBatch


@dataclass(frozen=True)
class RestEM:
    """threshold: rewards above it are kept; those rows' cross-entropy is the loss."""

    threshold: float = 0.0
    mean: str = "token"

    def advantages(self, scores: RewardBatch) -> Advantages:
        return [
            1.0 if reward is not None and reward > self.threshold else None
            for reward in scores.rewards
        ]

    def surrogate(self, sampled: PolicyLossInputs) -> Tensor:
        return -sampled.advantages_BR * sampled.logprobs_BR
