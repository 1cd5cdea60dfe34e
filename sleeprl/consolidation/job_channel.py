"""What the driver and the workers of a training job tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sleeprl.cluster.remote_actor import RemoteActor
from sleeprl.consolidation.train_loop import Job


@dataclass(frozen=True)
class Work:
    """What workers are given to do; without a job they end."""

    job: Job | None = None
    engines: Sequence[Any] = ()
    """Handles of the engines."""
    teachers: Sequence[Any] = ()
    """Handles of the teachers."""
    stall_seconds: float = 0.0
    """Who waits so long is named."""


class JobChannel(RemoteActor):
    """Holds the work of a job for its workers, and their records for the driver."""

    def __init__(self) -> None:
        self._work: Work | None = None
        self._records: list[dict[str, Any]] = []

    def give(self, work: Work) -> None:
        """Set what is to be done; workers that are restarted find it again."""
        self._work = work

    def work(self) -> Work | None:
        """Return what is to be done, None where it is not known yet."""
        return self._work

    def put(self, record: dict[str, Any]) -> None:
        """Append a record."""
        self._records.append(record)

    def drain(self) -> list[dict[str, Any]]:
        """Return all records, and forget them."""
        records, self._records = self._records, []
        return records
