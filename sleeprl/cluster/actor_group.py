"""A group of like actors: bounded calls in flight, results or classified failures.

Calls go through RLlib's FaultTolerantActorManager; which members may be given one is in the
group's ``GroupHealth``, and nowhere else. A member that died is replaced, and members come and
go, while the others work; a new one gets work when its weights are verified.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from sleeprl.cluster import health_probe
from sleeprl.cluster.failures import ActorFailure, Failure, FailureKind
from sleeprl.cluster.health import GroupHealth, HealthEvent, HealthState
from sleeprl.cluster.health_probe import HealthProbe
from sleeprl.cluster.in_flight import InFlightCalls, Result
from sleeprl.cluster.process_logs import ProcessLogs
from sleeprl.cluster.remote_actor import classify, method_call, value_of
from sleeprl.cluster.waits import WAITS, WaitKind

PEER_FAILURE_TIMEOUT_S = 3.0
"""How long the others are waited for when one has failed: its peer's death may be why."""
_WAIT_KINDS: dict[str, WaitKind] = {
    **dict.fromkeys(("start", "rendezvous"), "start"),
    **dict.fromkeys(("generate", "partial_refs"), "generate"),
    **dict.fromkeys(("publish", "set_expert", "save", "finish", "sleep"), "sync"),
    "logprobs": "score",
    "step": "train",
}
"""What a wait for these methods counts as; for others it is data."""


class ActorGroup:
    """Actors with one interface, each made from a ``RemoteActor`` class.

    Calls take keyword arguments only. A member's index, and its place in ``actors``, are its own
    for as long as the group is there; in the place of one that was removed is None.
    """

    def __init__(
        self, name: str, actors: Sequence[Any], in_flight: int = 2, silence: float = math.inf
    ) -> None:
        """
        Args:
            name: What messages call the members: ``name-0``, ``name-1``, ...
            actors: Handles; None for a member that was removed.
            in_flight: The most submitted calls under way per member.
            silence: Seconds for which a member may not answer before it is DEAD. A member whose
                methods are no coroutines answers only between two calls, so by default silence
                means nothing.
        """
        self.name = name
        self.actors = list(actors)
        self.health = GroupHealth(len(self.actors), silence, name=name)
        self.probe = HealthProbe(self.actors, self.health)
        self._calls = InFlightCalls(in_flight)
        self._logs = ProcessLogs()
        for index, actor in enumerate(self.actors):
            if actor is None:
                self.health.note(index, HealthEvent.RETIRE)
        self._logs.track(self.actors)

    @property
    def present(self) -> list[int]:
        """All members but those that were removed."""
        return [index for index, actor in enumerate(self.actors) if actor is not None]

    def __len__(self) -> int:
        return len(self.present)

    # --- calls to all -----------------------------------------------------------------

    def call(self, method: str, **kwargs: Any) -> list[Any]:
        """Call every member, wait for all, and return their values in order of index.

        Raises:
            ActorFailure: for the failure that explains the others, where some failed.
        """
        return self.scatter(method, [kwargs] * len(self))

    def scatter(self, method: str, per_actor: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Like ``call``, with arguments of its own for each member."""
        return self.collect(method, self.send(method, per_actor))

    def send(self, method: str, per_actor: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Call every member without waiting.

        Returns:
            References for ``collect``, to be taken before a member is removed.
        """
        calls = zip(self.present, per_actor, strict=True)
        return [self.call_one(index, method, **kwargs) for index, kwargs in calls]

    def collect(
        self, method: str, refs: Sequence[Any], members: Sequence[int] | None = None
    ) -> list[Any]:
        """Wait for calls that were sent, and return their values.

        Args:
            method: What was called.
            refs: What ``send`` returned.
            members: The members that were called, if not all.

        Raises:
            ActorFailure: for the failure that explains the others. A member that is DEAD before
                it answers has failed, also if it answers afterwards.
        """
        called = self.present if members is None else list(members)
        with self._wait_on(method):
            unfinished, dead = _wait_all(self, dict(zip(refs, called, strict=True)))
        values = [None if ref in unfinished else value_of(ref) for ref in refs]
        failures = [(i, v) for i, v in zip(called, values, strict=True) if isinstance(v, Failure)]
        failures += [(index, self.probe.silence()) for index in dead]
        failures.sort(key=lambda pair: pair[1].kind is FailureKind.FATAL)
        if failures:
            index, failure = failures[0]
            raise ActorFailure(f"{self.name}-{index}.{method}", failure)
        return values

    def is_done(self, refs: Sequence[Any]) -> bool:
        """Whether ``collect`` of these would not wait for long: all have ended, or one has failed."""
        done, rest = ray.wait(list(refs), num_returns=len(refs), timeout=0)
        return not rest or any(isinstance(value_of(ref), Failure) for ref in done)

    # --- calls to one -----------------------------------------------------------------

    def call_one(self, index: int, method: str, **kwargs: Any) -> Any:
        """Call one member without waiting; return the reference, for ``wait``."""
        return self.actors[index].apply.remote(method_call(method), **kwargs)

    def wait(self, index: int, ref: Any, method: str) -> Any:
        """Return what a call to a member gave; a Failure also where it is DEAD before it answers."""
        with self._wait_on(method, index):
            while not ray.wait([ref], timeout=health_probe.PROBE_INTERVAL_S)[0]:
                self.poll_health()
                # A call to a process that is gone ends too, and its error says more.
                if (
                    self.health[index] is HealthState.DEAD
                    and not ray.wait([ref], timeout=PEER_FAILURE_TIMEOUT_S)[0]
                ):
                    return self.probe.silence()
        try:
            return ray.get(ref)
        except RayError as error:
            if isinstance(error, RayActorError):
                self.note(index, HealthEvent.LOST)
            return classify(error)

    def _wait_on(self, method: str, index: int | None = None) -> AbstractContextManager[Any]:
        target = self.name if index is None else f"{self.name}-{index}"
        kind = _WAIT_KINDS.get(method, "data")
        return WAITS.on(target, what=method, kind=kind, log_tail=partial(self.log_tail, index))

    # --- calls in flight --------------------------------------------------------------

    def limit_in_flight(self, limit: int) -> None:
        """Set the most submitted calls per member. Raises RuntimeError while one is under way."""
        if self._calls.outstanding:
            raise RuntimeError(f"{self.name}: {self.outstanding} calls are under way")
        self._calls = InFlightCalls(limit)

    def submit(self, method: str, tag: str, **kwargs: Any) -> bool:
        """Send one call to the least loaded HEALTHY member; False when none has room."""
        load = {index: self._calls.load(index) for index in self.health.working}
        index = min(load, key=load.__getitem__, default=None)
        if index is None or load[index] >= self._calls.limit:
            return False
        return self._calls.submit(index, self.actors[index], method, tag, kwargs)

    def ready(self, timeout: float = 0.0) -> list[Result]:
        """Return the calls that ended within ``timeout`` seconds; all those of a lost member."""
        self.poll_health()
        results, gone = self._calls.collect(timeout)
        for index in gone:
            self.note(index, HealthEvent.LOST)
        for index in self.health.having(HealthState.DEAD):
            results += self._calls.end_all(index, self.probe.silence())
        return results

    def ready_or_raise(self, timeout: float = 0.0) -> list[Result]:
        """Like ``ready``, for a caller that cannot handle a failure: it is raised as ActorFailure."""
        results = self.ready(timeout)
        for result in results:
            if result.failure is not None:
                raise ActorFailure(f"{self.name}-{result.actor}, {result.tag}", result.failure)
        return results

    @property
    def outstanding(self) -> int:
        """Submitted calls whose end was not returned yet."""
        return self._calls.outstanding

    # --- health -----------------------------------------------------------------------

    def note(self, index: int, event: HealthEvent) -> None:
        """Note an event of a member."""
        self.probe.note(index, event)

    def poll_health(self) -> None:
        """Note who answered and, where silence may mean death, ping all in turn. Does not wait."""
        self.probe.poll()

    def probe_dead(self, timeout: float = health_probe.PING_TIMEOUT_S) -> list[int]:
        """Return the members that are gone or say that they cannot work; see ``HealthProbe``."""
        return self.probe.probe_dead(timeout)

    def has_healthy(self) -> bool:
        """Whether a member may be given work. Raises ActorFailure where none ever will be."""
        health = self.health
        if not (health.working or health.having(HealthState.SUSPECT)):  # which may answer yet
            message = f"none may be given work: {health}"
            raise ActorFailure(self.name, Failure(FailureKind.RETRYABLE, message))
        return bool(health.working)

    def log_tail(self, index: int | None = None) -> list[str]:
        """Return the last lines in the log of each process, or of one member's, on this host."""
        members = self.present if index is None else [index]
        return self._logs.tail(self.actors[i] for i in members)

    # --- members ----------------------------------------------------------------------

    def add(self, actor: Any) -> int:
        """Add a member, RESTARTING until it has ``started``; return its index."""
        self.actors.append(actor)
        self._logs.track([actor])
        return self.health.add()

    def remove(self, index: int) -> None:
        """Kill a member and take it out for good. The next ``ready`` returns its calls as lost."""
        self._detach(index, "removed")
        self.note(index, HealthEvent.RETIRE)
        self.actors[index] = None

    def replace(self, index: int, actor: Any) -> None:
        """Kill a member and put a new actor in its place, RESTARTING until it has ``started``.

        The next ``ready`` returns its calls as lost.
        """
        self._detach(index, "replaced")
        self.note(index, HealthEvent.LOST)
        self.note(index, HealthEvent.RESTART)
        self.actors[index] = actor
        self._logs.track([actor])

    def _detach(self, index: int, how: str) -> None:
        if self.actors[index] is None:
            raise ValueError(f"{self.name}-{index} was removed; it cannot be {how}")
        self._calls.detach(index, Failure(FailureKind.RETRYABLE, f"{self.name}-{index} was {how}"))
        ray.kill(self.actors[index])

    def start(self, members: Sequence[int]) -> None:
        """Bring up RESTARTING members, all at once, and wait for them; see ``started``."""
        self.collect("start", [self.call_one(i, "start") for i in members], members)
        self.started(members)

    def started(self, members: Iterable[int]) -> None:
        """Note that members are up: STALE, since their weights are not verified yet."""
        for index in members:
            self.note(index, HealthEvent.STARTED)

    def updated(self, verified: Iterable[int]) -> None:
        """Note the end of an update: the ``verified`` may work, all others that are there may not."""
        right = set(verified)
        for index in self.health.updatable:  # one may have died since
            self.note(index, HealthEvent.VERIFIED if index in right else HealthEvent.UNVERIFIED)

    def kill(self) -> None:
        """Kill all members."""
        for index in self.present:
            ray.kill(self.actors[index])


def _wait_all(group: ActorGroup, waiting: dict[Any, int]) -> tuple[set[Any], list[int]]:
    """Wait until all calls have ended or, once one has failed, no longer than a grace period.

    Args:
        group: Whose members were called.
        waiting: The member of each call; calls that end are taken out.

    Returns:
        The calls that have not ended, and the members that died silently meanwhile.
    """
    failed, dead = False, list[int]()
    while waiting and not failed:
        done, _ = ray.wait(list(waiting), timeout=health_probe.PROBE_INTERVAL_S)
        if not done:
            group.poll_health()
            dead = [i for i in waiting.values() if group.health[i] is HealthState.DEAD]
            failed = bool(dead)
        for ref in done:
            del waiting[ref]
            failed |= isinstance(value_of(ref), Failure)
    if not waiting:
        return set(), dead
    refs = list(waiting)
    _, rest = ray.wait(refs, num_returns=len(refs), timeout=PEER_FAILURE_TIMEOUT_S)
    return set(rest), dead
