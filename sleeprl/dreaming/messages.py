"""Return values of dreaming's actors to the driver. A batch is always an object reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sleeprl.dreaming.types import Outcome


@dataclass(frozen=True)
class ScoreResult:
    """The result of a scorer for a group."""

    batch: Any
    """Reference to the batch with the scorer's columns."""


@dataclass(frozen=True)
class RewardResult:
    """The result of a reward actor for a group."""

    batch: Any
    """Reference to the batch, with ``reward`` or ``unscored`` in every row."""
    is_informative: bool
    """Whether the algorithm can learn from these rewards."""


@dataclass(frozen=True)
class LoadedGroup:
    """A group from a checkpoint."""

    batch: Any
    """Reference to the batch."""
    oldest_last_version: int | None
    """Minimum over the dreams of the policy version of their last token; None where nothing is written."""
    is_informative: bool
    """As in ``RewardResult``."""


@dataclass(frozen=True)
class StepResult:
    """The result of a trainer rank for an update."""

    metrics: Mapping[str, Any]
    """Metrics for the log; see the reference of metrics."""
    outcomes: Sequence[Outcome]
    """The outcome of each task, for the curriculum."""
    all_unscored: str = ""
    """Why the first dream has no reward, if none of the dreams has one."""


@dataclass(frozen=True)
class PublishResult:
    """The result of rank 0 after it sent its weights to the engines."""

    version: int
    """Policy version of these weights."""
    metrics: Mapping[str, float]
    """The pause of generation (seconds), and the difference between both sides (nats)."""
    verified: Sequence[int]
    """Indices of the engines that are verified to have the weights."""
    num_unverified: int
    """Number of engines that are not."""
    expert: Any
    """Reference to the expert's tensors, for the scorers."""
