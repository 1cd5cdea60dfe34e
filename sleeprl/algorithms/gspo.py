"""GSPO (2507.18071): the ratio of a whole sequence, its length-th root, as its reward is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sleeprl.algorithms.base import GroupClipped, PolicyLossInputs, clipped_loss

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GSPO(GroupClipped):
    """Clip the sequence's ratio; a root lies far closer to 1 than a token's ratio."""

    clip_low: float = 3e-4
    """How far below 1 a ratio counts (section 5.1)."""
    clip_high: float = 4e-4
    """How far above 1 a ratio counts (section 5.1)."""

    def surrogate(self, inputs: PolicyLossInputs) -> Tensor:
        ratio_B1 = (inputs.sequence_log_ratio_B1() / inputs.lengths_B1()).exp()
        ratio_BR = ratio_B1.expand_as(inputs.logprobs_BR)
        return clipped_loss(ratio_BR, inputs.advantages_BR, self.clip_low, self.clip_high)
