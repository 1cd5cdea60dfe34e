"""REINFORCE with the batch's mean as its baseline (Williams, 1992)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sleeprl.algorithms.base import Advantages, PolicyLossInputs, RewardBatch, batch_relative


@dataclass(frozen=True)
class Reinforce:
    """It has no ratio: what is off-policy needs a correction (``dreaming.importance_weight.level``)."""

    mean: str = "token"

    def advantages(self, scores: RewardBatch) -> Advantages:
        return batch_relative(scores, normalise=False)

    def surrogate(self, sampled: PolicyLossInputs) -> Tensor:
        return -sampled.advantages_BR * sampled.logprobs_BR
