"""Pings the members of a group: who answers, who does not, and who is dead."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from sleeprl.cluster.failures import Failure, FailureKind
from sleeprl.cluster.health import GroupHealth, HealthEvent, HealthState
from sleeprl.cluster.remote_actor import method_call

PING_TIMEOUT_S = 3.0
"""How long a member may take to answer a ping before it counts as missed."""
PROBE_INTERVAL_S = 10.0
"""Seconds between two rounds of pings, where silence may mean death."""


class HealthProbe:
    """Notes in a group's health what the pings of its members say."""

    def __init__(self, actors: Sequence[Any], health: GroupHealth) -> None:
        """
        Args:
            actors: The group's list of handles; None stands for a member that was removed.
            health: Where the answers are noted. Silence means death where its ``dead_after`` is
                finite.
        """
        self.actors = actors
        self.health = health
        self._pings: dict[int, tuple[Any, float]] = {}
        """For each member the ping that it has not answered yet, and when it was sent."""
        self._last_round = -math.inf

    @property
    def unanswered(self) -> list[int]:
        """Members with a ping that they have not answered."""
        return list(self._pings)

    def note(self, index: int, event: HealthEvent) -> None:
        """Note an event of a member; what it answers to an earlier ping is out of date."""
        self._pings.pop(index, None)
        self.health.note(index, event)

    def poll(self) -> None:
        """Collect answers and, where silence may mean death, ping all again in turn. Does not wait."""
        now = time.monotonic()
        if math.isfinite(self.health.dead_after) and now - self._last_round >= PROBE_INTERVAL_S:
            self._last_round = now
            self.ping(self.health.updatable)
        self._collect_pings(PING_TIMEOUT_S)

    def probe_dead(self, timeout: float = PING_TIMEOUT_S) -> list[int]:
        """Ping all members and return those that are gone or say that they cannot work.

        A member that is busy for ``timeout`` seconds is alive. Where silence may mean death, one
        that holds up the others is waited for until it answers or is DEAD.
        """
        self.ping([*self.health.updatable, *self.health.having(HealthState.RESTARTING)])
        unfit, waiting = set[int](), self.unanswered
        while waiting:
            refs = [self._pings[index][0] for index in waiting]
            ray.wait(refs, num_returns=len(refs), timeout=timeout)
            unfit.update(self._collect_pings(0.0))
            waiting = [index for index in self._blocking_members() if index in self._pings]
        return sorted({*unfit, *self.health.having(HealthState.DEAD)})

    def silence(self) -> Failure:
        """Return the failure of a member that is DEAD because it did not answer."""
        return Failure(
            FailureKind.RETRYABLE, f"it did not answer for {self.health.dead_after:.0f} s"
        )

    def ping(self, members: Iterable[int]) -> None:
        """Send a ping to these members, but to none that has one to answer."""
        for index in members:
            if index not in self._pings:
                ref = self.actors[index].apply.remote(method_call("ping"))
                self._pings[index] = ref, time.monotonic()

    def _blocking_members(self) -> list[int]:
        """Return members whose silence holds up others.

        Every update waits for the STALE, and all work for the SUSPECT where no other member may
        be given it.
        """
        if math.isinf(self.health.dead_after):
            return []
        suspects = [] if self.health.working else [HealthState.SUSPECT]
        return self.health.having(HealthState.STALE, *suspects)

    def _collect_pings(self, grace: float) -> list[int]:
        """Note the answers, and as missed what has none after ``grace`` seconds.

        Returns:
            Members that said that they cannot work.
        """
        unfit = []
        for index, (ref, sent_at) in list(self._pings.items()):
            if not ray.wait([ref], timeout=0)[0]:
                if time.monotonic() - sent_at >= grace:
                    self.health.note(index, HealthEvent.MISSED)
                continue
            del self._pings[index]
            event = _event_of(ref)
            if event is HealthEvent.UNVERIFIED and self.health[index] is HealthState.RESTARTING:
                continue  # it is not up yet
            self.health.note(index, event)
            if event is not HealthEvent.ANSWERED:
                unfit.append(index)
        return unfit


def _event_of(ping: Any) -> HealthEvent:
    try:
        failed = isinstance(ray.get(ping), Failure)
    except RayActorError:
        return HealthEvent.LOST
    except RayError:
        return HealthEvent.UNVERIFIED
    return HealthEvent.UNVERIFIED if failed else HealthEvent.ANSWERED
