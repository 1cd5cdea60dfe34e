"""Which groups of dreams an update learns from, and which are set aside for others."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from sleeprl.dreaming.checkpoint import DreamingCheckpoint


def order_groups(
    numbers: Iterable[int], equal: Collection[int], size: int, redraws: int
) -> tuple[list[int], list[int]]:
    """Groups in the order in which they are learned, ``size`` an update, and those set aside.

    equal: groups known to teach nothing. Each is set aside, for one with a later number, until
    that was done ``redraws`` times for the update. One more that is known to be equal never
    makes the line longer, up to any number: nobody in it has to wait longer than before. And it
    does not matter in which order they came to be known.
    """
    line: list[int] = []
    aside: list[int] = []
    left = redraws
    for number in numbers:
        if number in equal and left:
            aside.append(number)
            left -= 1
            continue
        line.append(number)
        if len(line) % size == 0:
            left = redraws
    return line, aside


@dataclass
class AdmissionQueue:
    """All groups that were admitted and are not done. size: groups an update learns. redraws:
    groups that may be set aside for one. equal: those that were found to teach nothing."""

    position: DreamingCheckpoint
    size: int
    staleness: int
    redraws: int
    equal: set[int] = field(default_factory=set)

    def next(self) -> tuple[list[int], list[int]]:
        """Of the next update: the groups that it learns, fewer where they are not yet admitted, and
        those set aside for them."""
        line, aside = self._whole()
        last = line[: self.size][-1:]
        return line[: self.size], [number for number in aside if number < (last or [0])[0]]

    def update(self, number: int) -> int:
        """The update, from 0, that learns a group, as far as is known now; never a later one."""
        return self.position.version + bisect_left(self._whole()[0], number) // self.size

    def since(self, number: int) -> int:
        """The oldest policy version whose tokens may be learned from in the update that learns the
        group. Admission sees to it that none is older, unless an engine missed an update, or a run
        goes on with a smaller ``staleness``."""
        return self.update(number) + self.position.first_version - self.staleness

    def too_old(self, number: int, newest: int | None) -> bool:
        """Whether there is nothing to learn from in one of its dreams. newest: the version that wrote
        the last token of the dream in which it is least."""
        return newest is not None and newest < self.since(number)

    def _whole(self) -> tuple[list[int], list[int]]:
        there = range(self.position.done, len(self.position.admitted))
        return order_groups(there, self.equal, self.size, self.redraws)
