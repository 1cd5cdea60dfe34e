"""What the training loop needs of the system that runs it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from sleeprl.consolidation.messages import Report


class TrainLoopBackend(Protocol):
    """Storage of the loop's checkpoints, and receiver of its reports. Called on every rank."""

    def latest_checkpoint(self) -> AbstractContextManager[Path | None]:
        """Return the last checkpoint as a directory to read from, or None."""
        ...

    def save_checkpoint(self, step: int, directory: Path) -> None:
        """Copy the directories of all ranks into one checkpoint, taken after ``step``."""
        ...

    def report(self, report: Report) -> None:
        """Forward a report: a step, or the end of the job."""
        ...
