"""What the workers of a training job report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class WorkersStarted:
    """A group of workers has started, and imports what it needs."""

    pid: int
    """Process of rank 0."""


@dataclass(frozen=True)
class TrainerReady:
    """The model and the data are loaded: the next report is a step's."""


@dataclass(frozen=True)
class StepReport:
    """One optimiser step."""

    step: int
    """Counted from 1, over all attempts."""
    metrics: Mapping[str, float]
    """Means over the step's tokens of all ranks, by name."""


@dataclass(frozen=True)
class JobEnd:
    """The job is done."""

    steps: int
    """Optimiser steps, over all attempts."""
    tokens: int
    """Tokens that were trained on, over all attempts."""
    version: int
    """Policy version of the final weights."""
    verified: Sequence[int]
    """Indices of the engines that have them, verified."""


Report = WorkersStarted | TrainerReady | StepReport | JobEnd
