"""Where the groups of dreams are, and how old they get."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from sleeprl.cluster.waits import WaitKind


@dataclass
class StageCounts:
    """Groups of dreams by where they are. Kept by the moves, at each of which it is asserted that
    the group was there; at every turn it is held against where the groups are in fact."""

    admitted: int = 0
    generating: int = 0
    scoring: int = 0
    rewarding: int = 0
    queued: int = 0
    learning: int = 0
    learned: int = 0
    redrawn: int = 0
    """Set aside, since another group was drawn in their place."""

    def move(self, source: str, target: str, groups: int = 1) -> None:
        """From ``admitted``, which is no place, groups come; to it those that are lost go back."""
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

    def check(self, admitted: int, generating: int, held: Iterable[str]) -> None:
        """admitted: groups that have a number and need not be written again. generating: calls of
        the engines. held: the stage of each group whose batch is there. Raises AssertionError where
        a group was lost or doubled."""
        found = Counter({"generating": generating})
        found.update(held)
        stages = ("generating", "scoring", "rewarding", "queued", "learning")
        moved = {stage: getattr(self, stage) for stage in stages}
        same = all(moved[stage] == found[stage] for stage in stages)
        assert same and admitted == self.admitted == found.total() + self.learned + self.redrawn, (
            f"a group of dreams was lost or doubled: {self}; but {admitted} are admitted, {found}"
        )

    def idle(self, busy: Mapping[str, bool]) -> Iterator[tuple[str, str | None, str, WaitKind]]:
        """Each actor with whom it waits for (None: it is busy), for what, and the kind of wait."""
        stages = (("reward", self.rewarding), ("scorer", self.scoring))
        holder, groups = next(((n, g) for n, g in stages if g), ("engine", self.generating))
        waits: tuple[tuple[str, str, str, WaitKind], ...] = (
            ("engine", "learner", "room for a group, or its turn", "gate"),
            ("scorer", "engine", "dreams", "data"),
            ("reward", "scorer", "scored dreams", "data"),
            ("learner", holder, f"{groups} groups there", "data"),
        )
        for name, whom, what, kind in waits:
            yield name, None if busy[name] else whom, what, kind


@dataclass
class GroupLatency:
    """Seconds from the end of a group's writing to the update that learns it, and from the end of
    an update to the moment in which all engines have its weights: the publish lag."""

    clock: Callable[[], float] = time.monotonic
    last: list[float] = field(default_factory=list)
    _written: dict[int, float] = field(default_factory=dict)
    _updated: float | None = None

    def seen(self, number: int) -> None:
        """A group has come out of a stage; the first time it was written."""
        self._written.setdefault(number, self.clock())

    def learning(self, numbers: Iterable[int]) -> None:
        """An update begins on these groups; ``last`` is how old they are."""
        now = self.clock()
        self.last = [now - self._written.pop(n) for n in numbers if n in self._written]

    def updated(self) -> None:
        """An update has ended; said again before its ``lag`` was asked for, the first counts."""
        self._updated = self.clock() if self._updated is None else self._updated

    def lag(self) -> float:
        began, self._updated = self._updated, None
        return 0.0 if began is None else self.clock() - began
