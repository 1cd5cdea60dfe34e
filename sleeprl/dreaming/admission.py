"""Which groups of dreams an update learns from, and which are set aside for others."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from sleeprl.dreaming.checkpoint import DreamingCheckpoint


def order_groups(
    numbers: Iterable[int], uninformative: Collection[int], size: int, max_redraws: int
) -> tuple[list[int], list[int]]:
    """Order groups for learning, and set aside those that teach nothing.

    A group that is known to teach nothing is set aside for one with a later number, at most
    ``max_redraws`` times an update. One more such group never makes the order of learning longer up
    to any number, so no group waits longer than before; and it does not matter in which order the
    groups came to be known.

    Args:
        numbers: groups in order of admission.
        uninformative: groups that are known to teach nothing.
        size: groups of an update.
        max_redraws: groups that may be set aside for one update.

    Returns:
        The groups in order of learning, ``size`` an update; and those that are set aside.
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
    """All groups that are admitted and not finished, in order of learning."""

    checkpoint: DreamingCheckpoint
    """Where the numbers and the count of updates are kept."""
    size: int
    """Groups of an update."""
    max_staleness: int
    """Updates by which a token's policy may trail the trainer's."""
    max_redraws: int
    """Groups that may be set aside for one update."""
    uninformative: set[int] = field(default_factory=set)
    """Groups that are known to teach nothing."""

    def next_step(self) -> tuple[list[int], list[int]]:
        """Return the groups of the next update, fewer where some are not yet admitted, and those that
        are set aside for them."""
        learned, redrawn = self._order()
        last = learned[: self.size][-1:]
        return learned[: self.size], [number for number in redrawn if number < (last or [0])[0]]

    def step_of(self, number: int) -> int:
        """Return the update, from 0, that learns a group; what becomes known later only makes it
        earlier."""
        return self.checkpoint.version + bisect_left(self._order()[0], number) // self.size

    def min_version(self, number: int) -> int:
        """Return the oldest policy version whose tokens the update of a group may learn from.

        Admission keeps younger what engines write; unless an engine missed an update, or a run goes
        on with a smaller ``max_staleness``.
        """
        return self.step_of(number) + self.checkpoint.first_version - self.max_staleness

    def is_too_old(self, number: int, oldest_last_version: int | None) -> bool:
        """Tell whether one of a group's dreams has no token that may be learned from.

        Args:
            number: the group.
            oldest_last_version: the version of each dream's last token, the least of them; None
                where nothing is written.
        """
        return oldest_last_version is not None and oldest_last_version < self.min_version(number)

    def _order(self) -> tuple[list[int], list[int]]:
        unfinished = range(self.checkpoint.num_finished, len(self.checkpoint.task_ids))
        return order_groups(unfinished, self.uninformative, self.size, self.max_redraws)
