"""What is known of each engine, as a table of transitions. Pure: no threads, no ray.

The transition that is not there matters most: nothing leads from DEAD, RESTARTING or STALE to
HEALTHY but a verified update. An engine that answers again after it was lost holds weights
that nobody vouches for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum


class HealthState(StrEnum):
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    """It did not answer; it gets no work until it does."""
    STALE = "stale"
    """It is there, but its weights are not known to be right."""
    DEAD = "dead"
    RESTARTING = "restarting"
    """Its process comes up: in the place of one that was lost, or as a new member."""
    RETIRED = "retired"
    """Taken out on purpose, for good."""


class HealthEvent(StrEnum):
    ANSWERED = "answered"
    MISSED = "missed"
    """It did not answer in time."""
    VERIFIED = "verified"
    UNVERIFIED = "unverified"
    """An update did not end verified, or did not end."""
    LOST = "lost"
    """Its process is gone."""
    RESTART = "restart"
    STARTED = "started"
    RETIRE = "retire"


_H, _E = HealthState, HealthEvent
TRANSITIONS: dict[HealthState, dict[HealthEvent, HealthState]] = {
    _H.HEALTHY: {
        _E.ANSWERED: _H.HEALTHY, _E.MISSED: _H.SUSPECT, _E.VERIFIED: _H.HEALTHY,
        _E.UNVERIFIED: _H.STALE, _E.LOST: _H.DEAD, _E.RETIRE: _H.RETIRED,
    },
    _H.SUSPECT: {
        _E.ANSWERED: _H.HEALTHY, _E.MISSED: _H.SUSPECT, _E.VERIFIED: _H.HEALTHY,
        _E.UNVERIFIED: _H.STALE, _E.LOST: _H.DEAD, _E.RETIRE: _H.RETIRED,
    },
    _H.STALE: {
        _E.ANSWERED: _H.STALE, _E.MISSED: _H.STALE, _E.VERIFIED: _H.HEALTHY,
        _E.UNVERIFIED: _H.STALE, _E.LOST: _H.DEAD, _E.RETIRE: _H.RETIRED,
    },
    # A late answer may still arrive from the dead.
    _H.DEAD: {
        _E.ANSWERED: _H.DEAD, _E.MISSED: _H.DEAD, _E.UNVERIFIED: _H.DEAD, _E.LOST: _H.DEAD,
        _E.RESTART: _H.RESTARTING, _E.RETIRE: _H.RETIRED,
    },
    _H.RESTARTING: {
        _E.ANSWERED: _H.RESTARTING, _E.MISSED: _H.RESTARTING, _E.LOST: _H.DEAD,
        _E.STARTED: _H.STALE, _E.RETIRE: _H.RETIRED,
    },
    _H.RETIRED: dict.fromkeys(_E, _H.RETIRED),
}  # fmt: skip


class GroupHealth:
    """The state of each of ``count`` engines, which all begin HEALTHY: with the checkpoint's weights.

    dead_after: seconds after which one that was missed, and not heard of since, is DEAD when it is
    missed again; whether it was SUSPECT or STALE.
    """

    def __init__(
        self,
        count: int,
        dead_after: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        name: str = "engine",
    ) -> None:
        self._states = [HealthState.HEALTHY] * count
        self._silent: list[float | None] = [None] * count
        """Since when each has been missed without a break."""
        self.dead_after, self._clock, self._name = dead_after, clock, name

    def add(self) -> int:
        """A new member, whose process comes up; returns its number."""
        self._states.append(HealthState.RESTARTING)
        self._silent.append(None)
        return len(self) - 1

    def note(self, engine: int, event: HealthEvent) -> HealthState:
        """Raises ValueError for what cannot happen to an engine in that state."""
        state = self[engine]
        if event not in TRANSITIONS[state]:
            raise ValueError(f"{self._name}-{engine} is {state}; it cannot be {event}")
        after = TRANSITIONS[state][event]
        since, now = self._silent[engine], self._clock()
        # Told by who misses it, not by the clock alone: an answer may be there and not heard yet.
        if event is not HealthEvent.MISSED:
            self._silent[engine] = None
        elif since is None:
            self._silent[engine] = now
        elif state in (HealthState.SUSPECT, HealthState.STALE) and now - since > self.dead_after:
            after = HealthState.DEAD
        self._states[engine] = after
        return after

    def __getitem__(self, engine: int) -> HealthState:
        return self._states[engine]

    def __len__(self) -> int:
        return len(self._states)

    def __str__(self) -> str:
        return ", ".join(f"{self._name}-{number} is {self[number]}" for number in range(len(self)))

    def having(self, *states: HealthState) -> list[int]:
        return [engine for engine in range(len(self)) if self[engine] in states]

    @property
    def working(self) -> list[int]:
        """Engines that may be given work."""
        return self.having(HealthState.HEALTHY)

    @property
    def updatable(self) -> list[int]:
        """Engines that are there to be sent weights."""
        return self.having(HealthState.HEALTHY, HealthState.SUSPECT, HealthState.STALE)
