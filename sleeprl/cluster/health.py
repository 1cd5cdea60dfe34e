"""Keeps what is known of each member of a group, as a table of transitions. Pure: no threads, no ray.

The transition that is not there matters most: nothing leads from DEAD, RESTARTING or STALE to
HEALTHY but a verified update. An engine that answers again after it was lost holds weights
that are not proven.
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
    """The state of each member. All begin HEALTHY: an engine starts with the checkpoint's weights."""

    def __init__(
        self,
        count: int,
        dead_after: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        name: str = "engine",
    ) -> None:
        """
        Args:
            count: How many members there are.
            dead_after: Seconds. A SUSPECT or STALE member that has been missed for longer, without
                an answer in between, is DEAD when it is missed again.
            clock: Returns seconds.
            name: What messages call a member.
        """
        self._states = [HealthState.HEALTHY] * count
        self._silent: list[float | None] = [None] * count
        """Since when each has been missed without an answer; None for one that was not."""
        self.dead_after, self._clock, self._name = dead_after, clock, name

    def add(self) -> int:
        """Add a member whose process comes up; return its number."""
        self._states.append(HealthState.RESTARTING)
        self._silent.append(None)
        return len(self) - 1

    def note(self, engine: int, event: HealthEvent) -> HealthState:
        """Note an event and return the state after it.

        Raises:
            ValueError: the event cannot happen to a member in its state.
        """
        state = self[engine]
        if event not in TRANSITIONS[state]:
            raise ValueError(f"{self._name}-{engine} is {state}; it cannot be {event}")
        after = TRANSITIONS[state][event]
        since, now = self._silent[engine], self._clock()
        # Death needs another miss, not the clock alone: an answer may be there and not collected.
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
        """Return the members in one of these states."""
        return [engine for engine in range(len(self)) if self[engine] in states]

    @property
    def working(self) -> list[int]:
        """Members that may be given work."""
        return self.having(HealthState.HEALTHY)

    @property
    def updatable(self) -> list[int]:
        """Members that are there to be sent weights."""
        return self.having(HealthState.HEALTHY, HealthState.SUSPECT, HealthState.STALE)
