"""What dreaming's actors return to the driver. A batch is always an object reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sleeprl.dreaming.types import Outcome


@dataclass(frozen=True)
class ScoreResult:
    """What a scorer returns for a group."""

    batch: Any
    """Reference to the batch, with the columns that the scorer adds."""


@dataclass(frozen=True)
class RewardResult:
    """What a reward actor returns for a group."""

    batch: Any
    """Reference to the batch, with ``reward`` or ``unscored`` in every row."""
    is_informative: bool
    """Whether the algorithm finds anything to learn in these rewards."""


@dataclass(frozen=True)
class LoadedGroup:
    """A group that a checkpoint holds."""

    batch: Any
    """Reference to the batch."""
    oldest_last_version: int | None
    """The policy version of each dream's last token, the least of them; None where nothing is written."""
    is_informative: bool
    """As in ``RewardResult``."""


@dataclass(frozen=True)
class StepResult:
    """What a trainer rank returns for an update."""

    metrics: Mapping[str, Any]
    """For the log; see the reference of metrics."""
    outcomes: Sequence[Outcome]
    """What came of each task, for the curriculum."""


@dataclass(frozen=True)
class PublishResult:
    """What rank 0 returns when it has sent its weights to the engines."""

    version: int
    """The policy version that was sent."""
    metrics: Mapping[str, float]
    """How long generation stood still (seconds), how far both sides differ (nats)."""
    verified: Sequence[int]
    """Indices of the engines that ended the update verified."""
    num_unverified: int
    """How many engines did not."""
    expert: Any
    """Reference to the expert's tensors, for the scorers."""
