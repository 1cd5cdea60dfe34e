"""The reports that the workers of a training job send to the driver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class WorkersStarted:
    """The start of a group of workers, which now import their dependencies."""

    pid: int
    """Process id of rank 0."""


@dataclass(frozen=True)
class TrainerReady:
    """The end of loading: model and data are ready, and the next report is that of a step."""


@dataclass(frozen=True)
class StepReport:
    """One optimiser step."""

    step: int
    """Counted from 1, over all attempts."""
    metrics: Mapping[str, float]
    """Means over the step's tokens of all ranks, by name."""


@dataclass(frozen=True)
class EarlierSteps:
    """The steps before the checkpoint that a job resumes from: the driver may have missed some."""

    reports: Sequence[StepReport]
    """All of them, in order."""


@dataclass(frozen=True)
class JobEnd:
    """The end of the job."""

    steps: int
    """Optimiser steps, over all attempts."""
    tokens: int
    """Trained tokens, over all attempts."""
    version: int
    """Policy version of the final weights."""
    verified: Sequence[int]
    """Indices of the engines that verifiably have these weights."""


Report = WorkersStarted | TrainerReady | StepReport | EarlierSteps | JobEnd
