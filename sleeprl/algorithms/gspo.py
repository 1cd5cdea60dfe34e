"""GSPO (2507.18071): the ratio of a whole sequence, its length-th root, as the reward is a sequence's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sleeprl.algorithms.base import GroupClipped, PolicyLossInputs, clipped


@dataclass(frozen=True)
class GSPO(GroupClipped):
    """The bounds are the paper's (section 5.1): a root lies far closer to 1 than a token's ratio."""

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def surrogate(self, sampled: PolicyLossInputs) -> Tensor:
        ratio_B1 = (sampled.sequence_log_ratio_B1() / sampled.lengths_B1()).exp()
        ratio_BR = ratio_B1.expand_as(sampled.logprobs_BR)
        return clipped(ratio_BR, sampled.advantages_BR, self.clip_low, self.clip_high)
