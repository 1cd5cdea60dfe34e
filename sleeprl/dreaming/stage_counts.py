"""Counts the groups of dreams in each stage, and measures their latency."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from sleeprl.cluster.waits import WaitKind


@dataclass
class StageCounts:
    """Number of groups of dreams by stage, updated by transitions alone.

    Each transition asserts that its source stage has the group; ``check`` compares the counts with
    the groups themselves.
    """

    admitted: int = 0
    """Groups that have a number and do not wait for an engine again."""
    generating: int = 0
    scoring: int = 0
    rewarding: int = 0
    queued: int = 0
    learning: int = 0
    learned: int = 0
    redrawn: int = 0
    """Groups that were set aside for another one."""

    def move(self, source: str, target: str, groups: int = 1) -> None:
        """Move groups from one stage to another.

        Args:
            source: Source stage; ``admitted`` for groups that are in no stage yet.
            target: Target stage; ``admitted`` for groups that have to be generated again.
            groups: Number of groups.

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
        """Check the counts against the groups.

        Args:
            admitted: Number of groups that have a number and do not wait for an engine again.
            generating: Number of unfinished calls to engines.
            stages: Stage of each unfinished group that is past its engine.

        Raises:
            AssertionError: A group was lost or duplicated.
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
        """Determine what each kind of actor waits for.

        Args:
            busy: Whether an actor of each name has work.

        Yields:
            Its name, the name of the actors that it waits for (None if it has work), a description
            of what it waits for, and the kind of wait.
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
    """Latencies of groups and of weight updates.

    Measured are the seconds from the end of a group's generation to its update, and from the end of
    an update until all engines have its weights (the publish lag).
    """

    clock: Callable[[], float] = time.monotonic
    """Returns the time in seconds."""
    last_ages: list[float] = field(default_factory=list)
    """Age of each group of the last update at the start of that update, in seconds."""
    _generated: dict[int, float] = field(default_factory=dict)
    _step_ended: float | None = None

    def mark_generated(self, number: int) -> None:
        """Record the end of a group's generation; later calls for the same group have no effect."""
        self._generated.setdefault(number, self.clock())

    def start_step(self, numbers: Iterable[int]) -> None:
        """Record that an update of these groups starts, and their ages."""
        now = self.clock()
        self.last_ages = [now - self._generated.pop(n) for n in numbers if n in self._generated]

    def end_step(self) -> None:
        """Record the end of an update; only the first call before ``publish_lag`` counts."""
        self._step_ended = self.clock() if self._step_ended is None else self._step_ended

    def publish_lag(self) -> float:
        """Return the seconds since the end of the update, and reset."""
        ended, self._step_ended = self._step_ended, None
        return 0.0 if ended is None else self.clock() - ended
