"""How many groups of dreams are in each stage, and how old they get."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from sleeprl.cluster.waits import WaitKind


@dataclass
class StageCounts:
    """Groups of dreams by stage, kept by the transitions alone.

    Each transition asserts that the group was in the stage it leaves; ``check`` compares the counts
    with where the groups are.
    """

    admitted: int = 0
    """Groups that have a number and need no engine again."""
    generating: int = 0
    scoring: int = 0
    rewarding: int = 0
    queued: int = 0
    learning: int = 0
    learned: int = 0
    redrawn: int = 0
    """Groups that were set aside because another group was drawn in their place."""

    def move(self, source: str, target: str, groups: int = 1) -> None:
        """Move groups from one stage to another.

        Args:
            source: the stage that they leave; ``admitted`` for groups that no stage has yet.
            target: the stage that they enter; ``admitted`` for groups that have to be written again.
            groups: how many.

        Raises:
            AssertionError: ``source`` has fewer groups.
        """
        if source == "admitted":
            self.admitted += groups
        else:
            left = getattr(self, source) - groups
            assert left >= 0, f"{groups} groups cannot go from {source} to {target}: {self}"
            setattr(self, source, left)
        if target == "admitted":
            self.admitted -= groups
        else:
            setattr(self, target, getattr(self, target) + groups)

    def check(self, admitted: int, generating: int, stages: Iterable[str]) -> None:
        """Compare the counts with where the groups are.

        Args:
            admitted: groups that have a number and need no engine again.
            generating: calls to engines that have not ended.
            stages: the stage of each group that is past its engine and not finished.

        Raises:
            AssertionError: a group was lost or doubled.
        """
        found = Counter({"generating": generating})
        found.update(stages)
        names = ("generating", "scoring", "rewarding", "queued", "learning")
        same = all(getattr(self, name) == found[name] for name in names)
        total = found.total() + self.learned + self.redrawn
        assert same and admitted == self.admitted == total, (
            f"a group of dreams was lost or doubled: {self}; but {admitted} are admitted, {found}"
        )

    def idle(self, busy: Mapping[str, bool]) -> Iterator[tuple[str, str | None, str, WaitKind]]:
        """Say for each kind of actor what it waits for.

        Args:
            busy: whether an actor of each name has work.

        Yields:
            Its name, the name of the actors that it waits for (None: it has work), what it waits
            for, and the kind of wait.
        """
        behind = (("reward", self.rewarding), ("scorer", self.scoring))
        holder, groups = next(((n, g) for n, g in behind if g), ("engine", self.generating))
        waits: tuple[tuple[str, str, str, WaitKind], ...] = (
            ("engine", "learner", "room for a group, or its turn", "gate"),
            ("scorer", "engine", "dreams", "data"),
            ("reward", "scorer", "scored dreams", "data"),
            ("learner", holder, f"{groups} groups there", "data"),
        )
        for name, source, what, kind in waits:
            yield name, None if busy[name] else source, what, kind


@dataclass
class GroupLatency:
    """Seconds from the end of a group's generation to the update that learns it, and from the end of
    an update to the moment when all engines have its weights (the publish lag)."""

    clock: Callable[[], float] = time.monotonic
    """Seconds."""
    last_ages: list[float] = field(default_factory=list)
    """Age of each group of the last update when that update began, in seconds."""
    _generated: dict[int, float] = field(default_factory=dict)
    _step_ended: float | None = None

    def mark_generated(self, number: int) -> None:
        """Record that a group has left a stage; the first time it was generated."""
        self._generated.setdefault(number, self.clock())

    def start_step(self, numbers: Iterable[int]) -> None:
        """Record that an update begins on these groups, and how old they are."""
        now = self.clock()
        self.last_ages = [now - self._generated.pop(n) for n in numbers if n in self._generated]

    def end_step(self) -> None:
        """Record that an update has ended; repeated before ``publish_lag``, the first time counts."""
        self._step_ended = self.clock() if self._step_ended is None else self._step_ended

    def publish_lag(self) -> float:
        """Return the seconds since the update ended, and forget it."""
        ended, self._step_ended = self._step_ended, None
        return 0.0 if ended is None else self.clock() - ended
