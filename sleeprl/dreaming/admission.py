"""Admission: which groups of dreams an update learns from, and which are set aside."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from sleeprl.dreaming.checkpoint import DreamingCheckpoint


def order_groups(
    numbers: Iterable[int], uninformative: Collection[int], size: int, max_redraws: int
) -> tuple[list[int], list[int]]:
    """Order groups for learning, and set aside those that teach nothing.

    An uninformative group is set aside for one with a later number, at most ``max_redraws`` times
    per update. Setting one more group aside never lengthens the order of learning up to any number,
    so no group waits longer for it. The result does not depend on the order in which groups prove
    to be uninformative.

    Args:
        numbers: Groups in order of admission.
        uninformative: Groups that are known to teach nothing.
        size: Groups per update.
        max_redraws: Groups that may be set aside per update.

    Returns:
        The groups in order of learning, ``size`` per update; and those that are set aside.
    """
    learned: list[int] = []
    redrawn: list[int] = []
    left = max_redraws
    for number in numbers:
        if number in uninformative and left:
            redrawn.append(number)
            left -= 1
            continue
        learned.append(number)
        if len(learned) % size == 0:
            left = max_redraws
    return learned, redrawn


@dataclass
class AdmissionQueue:
    """The admitted and unfinished groups, in order of learning."""

    checkpoint: DreamingCheckpoint
    """Source of the task ids and of the number of finished updates."""
    size: int
    """Groups per update."""
    max_staleness: int
    """Largest number of updates by which a token's policy may trail the trainer's."""
    max_redraws: int
    """Groups that may be set aside per update."""
    uninformative: set[int] = field(default_factory=set)
    """Groups that are known to teach nothing."""

    def next_step(self) -> tuple[list[int], list[int]]:
        """Return the groups of the next update, and those that are set aside for them.

        The update has fewer than ``size`` groups where some are not admitted yet.
        """
        learned, redrawn = self._order()
        last = learned[: self.size][-1:]
        return learned[: self.size], [number for number in redrawn if number < (last or [0])[0]]

    def step_of(self, number: int) -> int:
        """Return the update, from 0, that learns from a group.

        Groups that prove uninformative later can only make it earlier.
        """
        return self.checkpoint.version + bisect_left(self._order()[0], number) // self.size

    def min_version(self, number: int) -> int:
        """Return the oldest policy version whose tokens a group's update may learn from.

        Admission bounds the staleness of what engines write. Older tokens occur only where an
        engine missed an update, or a run continues with a smaller ``max_staleness``.
        """
        return self.step_of(number) + self.checkpoint.first_version - self.max_staleness

    def is_too_old(self, number: int, oldest_last_version: int | None) -> bool:
        """Return whether one of a group's dreams has no token that is fresh enough to learn from.

        Args:
            number: The group.
            oldest_last_version: Minimum over the dreams of the version of their last token; None
                where nothing is written.
        """
        return oldest_last_version is not None and oldest_last_version < self.min_version(number)

    def _order(self) -> tuple[list[int], list[int]]:
        unfinished = range(self.checkpoint.num_finished, len(self.checkpoint.task_ids))
        return order_groups(unfinished, self.uninformative, self.size, self.max_redraws)
