"""GRPO (2402.03300, eq. 3): the group is the critic."""

from __future__ import annotations

from dataclasses import dataclass

from sleeprl.algorithms.base import GroupClipped


@dataclass(frozen=True)
class GRPO(GroupClipped):
    """Group-relative advantages; ``dreaming.reference_kl`` adds the paper's KL to the reference."""
