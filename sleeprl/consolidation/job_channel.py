"""The channel between the driver and the workers of training jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sleeprl.cluster.remote_actor import RemoteActor
from sleeprl.consolidation.messages import Report
from sleeprl.consolidation.train_loop import Job


@dataclass(frozen=True)
class Work:
    """Work for the training workers. Without a job they exit."""

    job: Job | None = None
    """The job to train."""
    engines: Sequence[Any] = ()
    """Handles of the engines."""
    teachers: Sequence[Any] = ()
    """Handles of the teachers."""
    stall_seconds: float = 0.0
    """Seconds after which a wait is reported."""


class JobChannel(RemoteActor):
    """Queue between driver and workers: work in one direction, reports in the other."""

    def __init__(self) -> None:
        self._work: Work | None = None
        self._number = 0
        self._reports: list[Report] = []

    def give(self, work: Work) -> None:
        """Set the next work. Restarted workers fetch it again."""
        self._work, self._number = work, self._number + 1

    def clear(self) -> None:
        """Drop the current work, which is done."""
        self._work = None

    def next_work(self, done: int) -> tuple[int, Work] | None:
        """Return the current work and its number, or None if there is no new work.

        Args:
            done: Number of the last work that the caller has done, initially 0.
        """
        if self._work is None or self._number <= done:
            return None
        return self._number, self._work

    def put(self, report: Report) -> None:
        """Append a report."""
        self._reports.append(report)

    def drain(self) -> list[Report]:
        """Return all reports and clear them."""
        reports, self._reports = self._reports, []
        return reports
