"""Dr.GRPO (2503.20783): GRPO without its two biases, for short wrong texts and for easy groups."""

from __future__ import annotations

from dataclasses import dataclass

from sleeprl.algorithms.base import GroupClipped


@dataclass(frozen=True)
class DrGRPO(GroupClipped):
    normalise: bool = False
    mean: str = "constant"
