"""What is known of each engine, as a table of transitions. Pure: no threads, no ray.

The transition that is not there matters most: nothing leads from DEAD, RESTARTING or STALE to
HEALTHY but a verified update. An engine that answers again after it was lost holds weights
that nobody vouches for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum


class Health(StrEnum):
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    """It did not answer; it gets no work until it does."""
    STALE = "stale"
    """It answers, but its weights are not known to be right."""
    DEAD = "dead"
    RESTARTING = "restarting"
    """Its process comes up: in the place of one that was lost, or as a new member."""
    RETIRED = "retired"
    """Taken out on purpose, for good."""


class Event(StrEnum):
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


_H, _E = Health, Event
TRANSITIONS: dict[Health, dict[Event, Health]] = {
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


class FleetHealth:
    """The state of each of ``count`` engines, which all begin HEALTHY: with the checkpoint's weights.

    dead_after: seconds for which an engine may be SUSPECT; when it is missed after them, it is DEAD.
    """

    def __init__(
        self,
        count: int,
        dead_after: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        name: str = "engine",
    ) -> None:
        self._states = [Health.HEALTHY] * count
        self._since = [clock()] * count
        self.dead_after, self._clock, self._name = dead_after, clock, name

    def add(self) -> int:
        """A new member, whose process comes up; returns its number."""
        self._states.append(Health.RESTARTING)
        self._since.append(self._clock())
        return len(self) - 1

    def note(self, engine: int, event: Event) -> Health:
        """Raises ValueError for what cannot happen to an engine in that state."""
        state = self[engine]
        if event not in TRANSITIONS[state]:
            raise ValueError(f"{self._name}-{engine} is {state}; it cannot be {event}")
        after = TRANSITIONS[state][event]
        # Told by who misses it, not by the clock alone: an answer may be there and not heard yet.
        if (
            state is after is Health.SUSPECT
            and self._clock() - self._since[engine] > self.dead_after
        ):
            after = Health.DEAD
        if after is not state:
            self._states[engine], self._since[engine] = after, self._clock()
        return after

    def __getitem__(self, engine: int) -> Health:
        return self._states[engine]

    def __len__(self) -> int:
        return len(self._states)

    def __str__(self) -> str:
        return ", ".join(f"{self._name}-{number} is {self[number]}" for number in range(len(self)))

    def having(self, *states: Health) -> list[int]:
        return [engine for engine in range(len(self)) if self[engine] in states]

    @property
    def working(self) -> list[int]:
        """Engines that may be given work."""
        return self.having(Health.HEALTHY)

    @property
    def updatable(self) -> list[int]:
        """Engines that are there to be sent weights."""
        return self.having(Health.HEALTHY, Health.SUSPECT, Health.STALE)
