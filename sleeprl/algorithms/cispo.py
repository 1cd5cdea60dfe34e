"""CISPO (2506.13585, eq. 4): the ratio is capped and only weighs; no token loses its gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sleeprl.algorithms.base import Advantages, PolicyLossInputs, RewardBatch, group_relative


@dataclass(frozen=True)
class CISPO:
    """cap: of the ratio."""

    normalise: bool = True
    cap: float = 5.0
    mean: str = "token"

    def advantages(self, scores: RewardBatch) -> Advantages:
        return group_relative(scores, normalise=self.normalise)

    def surrogate(self, sampled: PolicyLossInputs) -> Tensor:
        weight_BR = sampled.log_ratio_BR().exp().clamp(max=self.cap).detach()
        return -weight_BR * sampled.advantages_BR * sampled.logprobs_BR
