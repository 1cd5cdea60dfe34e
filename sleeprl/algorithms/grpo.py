"""GRPO (2402.03300, eq. 3): the group is the critic."""

from __future__ import annotations

from dataclasses import dataclass

from sleeprl.algorithms.base import GroupClipped


@dataclass(frozen=True)
class GRPO(GroupClipped):
    """Its KL to the reference is ``dreaming.reference_kl``, which any algorithm may have."""
