"""Dr.GRPO (2503.20783): GRPO without its two biases, for short wrong texts and for easy groups."""

from __future__ import annotations

from dataclasses import dataclass

from sleeprl.algorithms.base import GroupClipped


@dataclass(frozen=True)
class DrGRPO(GroupClipped):
    """GRPO without the group's deviation, and with a mean over a constant number of tokens."""

    normalise: bool = False
    """Divide by the group's deviation."""
    loss_aggregation: str = "constant"
    """See ``Algorithm.loss_aggregation``."""
