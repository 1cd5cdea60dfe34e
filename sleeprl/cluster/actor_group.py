"""A group of like actors: bounded calls in flight, results or classified failures.

Calls go through RLlib's FaultTolerantActorManager; who may be given one is in the group's
``GroupHealth``, and known nowhere else. A member that died is replaced, and members come and go,
while the others work; a new one gets work when its weights are verified.
"""

from __future__ import annotations

import inspect
import math
import os
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from sleeprl.cluster.failures import (
    ActorFailure,
    Failure,
    FailureKind,
    log_tail,
    pid_in,
    short_reason,
)
from sleeprl.cluster.health import GroupHealth, HealthEvent, HealthState
from sleeprl.cluster.waits import WAITS, WaitKind

UNFIT = ("EngineDeadError", "StaleEngine")
"""Of an actor that lives but cannot work: vLLM's core, another process, is gone; or an engine's
weights are not verified. Named, since whoever imports vLLM waits for it."""
PEER_FAILURE_TIMEOUT_S = 3.0
"""How long the others are waited for when one has failed: its peer's death may be why. Also how
long a member may take to say that it is there."""
PROBE_INTERVAL_S = 10.0
"""Seconds between two times that all are asked, where silence may mean death."""

STALL_LINES = 3
"""How much of each process's log is shown when one is waited for too long."""
_KINDS: dict[str, WaitKind] = {
    **dict.fromkeys(("start", "rendezvous"), "start"),
    **dict.fromkeys(("generate", "prefixes"), "generate"),
    **dict.fromkeys(("publish", "set_expert", "save", "finish", "sleep"), "sync"),
    "logprobs": "score",
    "step": "train",
}
"""What a wait for these methods counts as; for others it is data."""


def classify(error: BaseException) -> Failure:
    """Unknown is DATA: a bug must surface, not be retried for ever."""
    root = error.cause if isinstance(error, RayTaskError) and error.cause else error
    if isinstance(root, ActorFailure):  # of an actor that this one works with
        inner = root.failure
        return Failure(inner.kind, f"{root.where}: {inner.message}", inner.trace, inner.pid)
    if isinstance(root, RayActorError):
        if root.actor_init_failed:  # its constructor raised, which another process would do too
            last = str(root).strip().splitlines()[-1]
            return Failure(
                FailureKind.DATA, f"it did not start: {last}", str(root), pid_in(str(root))
            )
        return Failure(FailureKind.INFRA, short_reason(str(root)), "", pid_in(str(root)))
    lost = isinstance(root, RayError | ConnectionError | TimeoutError | MemoryError)
    lost = lost or type(root).__name__ in UNFIT
    trace = "".join(traceback.format_exception(error)[-6:])
    kind = FailureKind.INFRA if lost else FailureKind.DATA
    return Failure(kind, f"{type(root).__name__}: {root}", trace, os.getpid())


class RemoteActor:
    """What an actor needs to be a member of an ``ActorGroup``."""

    def ping(self) -> str:
        return "pong"

    def pid(self) -> int:
        return os.getpid()

    def apply(self, func: Callable[..., Any], **kwargs: Any) -> Any:
        try:
            return func(self, **kwargs)
        except Exception as error:
            return classify(error)


class AsyncRemoteActor(RemoteActor):
    """The same for an actor whose methods are coroutines."""

    async def apply(self, func: Callable[..., Any], **kwargs: Any) -> Any:  # type: ignore[override]
        try:
            value = func(self, **kwargs)
            return await value if inspect.isawaitable(value) else value
        except Exception as error:
            return classify(error)


@dataclass(frozen=True)
class Result:
    """The end of one submitted call: a value, or a Failure in its place."""

    actor: int
    tag: str
    value: Any

    @property
    def failure(self) -> Failure | None:
        return self.value if isinstance(self.value, Failure) else None


class ActorGroup:
    """Actors with one interface. Calls take keyword arguments only.

    A member's index, and its place in ``actors``, are its own for as long as the group is there;
    in the place of one that was removed is None. silence: seconds for which a member may not
    answer before it is DEAD. One whose methods are no coroutines answers only between two calls,
    so unless it is said, silence means nothing.
    """

    def __init__(
        self, name: str, actors: Sequence[Any], in_flight: int = 2, silence: float = math.inf
    ) -> None:
        self.name = name
        self.actors = list(actors)
        self.in_flight = in_flight
        self.health = GroupHealth(len(self.actors), silence, name=name)
        for index, actor in enumerate(self.actors):
            if actor is None:
                self.health.note(index, HealthEvent.RETIRE)
        self._tags: list[list[str]] = [[] for _ in self.actors]
        self._ids: dict[int, int] = {}
        self._lost: list[Result] = []
        self._pings: dict[int, tuple[Any, float]] = {}
        """Of each member the question that it has not answered yet, and when it was asked."""
        self._probed = -math.inf
        self._pids: dict[Any, Any] = {}
        self._know(self.actors)

    @cached_property
    def _manager(self) -> Any:
        # Importing RLlib takes seconds; whoever only calls and waits does without.
        from ray.rllib.utils.actor_manager import FaultTolerantActorManager

        return FaultTolerantActorManager(max_remote_requests_in_flight_per_actor=self.in_flight)

    def _id(self, index: int) -> int:
        """The manager's name for a member, of whom it hears with the first call."""
        if index not in self._ids:
            self._manager.add_actors([self.actors[index]])
            self._ids[index] = max(self._manager.actor_ids())
        return self._ids[index]

    @property
    def present(self) -> list[int]:
        """All members but those that were removed."""
        return [index for index, actor in enumerate(self.actors) if actor is not None]

    def __len__(self) -> int:
        return len(self.present)

    # --- calls ----------------------------------------------------------------------

    def call(self, method: str, **kwargs: Any) -> list[Any]:
        """Call every actor, wait for all, raise ActorFailure for the first that failed."""
        return self.scatter(method, [kwargs] * len(self))

    def scatter(self, method: str, per_actor: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Like ``call``, with arguments of its own for each actor."""
        return self.collect(method, self.send(method, per_actor))

    def send(self, method: str, per_actor: Sequence[Mapping[str, Any]]) -> list[Any]:
        """One call per actor, not waited for; ``collect`` takes what this returns, before anybody
        is removed."""
        return self._send(method, self.present, per_actor)

    def _send(
        self, method: str, members: Sequence[int], per_actor: Sequence[Mapping[str, Any]]
    ) -> list[Any]:
        call = _method(method)
        return [
            self.actors[index].apply.remote(call, **kw)
            for index, kw in zip(members, per_actor, strict=True)
        ]

    def collect(
        self, method: str, refs: Sequence[Any], members: Sequence[int] | None = None
    ) -> list[Any]:
        """The values of sent calls. Of several failures the one that explains the others is raised;
        being DEAD before it answers is one.

        members: who was asked, if not all.
        """
        asked = self.present if members is None else members
        waiting, failed, dead = dict(zip(refs, asked, strict=True)), False, list[int]()
        with self._waits(method):
            while waiting and not failed:
                done, _ = ray.wait(list(waiting), timeout=PROBE_INTERVAL_S)
                if not done:
                    self.look()
                    dead = [i for i in waiting.values() if self.health[i] is HealthState.DEAD]
                    failed = bool(dead)
                for ref in done:
                    del waiting[ref]
                    failed |= isinstance(_value(ref), Failure)
            if waiting:
                _, rest = ray.wait(
                    list(waiting), num_returns=len(waiting), timeout=PEER_FAILURE_TIMEOUT_S
                )
                waiting = {ref: waiting[ref] for ref in rest}
        values = [None if ref in waiting else _value(ref) for ref in refs]
        failures = [(i, v) for i, v in zip(asked, values, strict=True) if isinstance(v, Failure)]
        failures += [(index, self._silence()) for index in dead]  # also if it answers by now
        for index, failure in sorted(failures, key=lambda pair: pair[1].kind is FailureKind.DATA)[
            :1
        ]:
            raise ActorFailure(f"{self.name}-{index}.{method}", failure)
        return values

    def wait(self, index: int, ref: Any, method: str) -> Any:
        """What a call to a member gave, or a Failure; also of one that is DEAD before it answers."""
        with self._waits(method, index):
            while not ray.wait([ref], timeout=PROBE_INTERVAL_S)[0]:
                self.look()
                # A call to a process that is gone ends too, and tells more.
                if (
                    self.health[index] is HealthState.DEAD
                    and not ray.wait([ref], timeout=PEER_FAILURE_TIMEOUT_S)[0]
                ):
                    return self._silence()
        try:
            return ray.get(ref)
        except RayError as error:
            if isinstance(error, RayActorError):
                self.note(index, HealthEvent.LOST)
            return classify(error)

    def _waits(self, method: str, index: int | None = None) -> AbstractContextManager[Any]:
        """A wait of this process for all, or for a member."""
        whom = self.name if index is None else f"{self.name}-{index}"
        kind, wrote = _KINDS.get(method, "data"), partial(self.wrote, index)
        return WAITS.on(whom, what=method, kind=kind, wrote=wrote)

    def ended(self, refs: Sequence[Any]) -> bool:
        """Whether ``collect`` of these would not wait for long: all are done, or one has failed."""
        done, rest = ray.wait(list(refs), num_returns=len(refs), timeout=0)
        return not rest or any(isinstance(_value(ref), Failure) for ref in done)

    def submit(self, method: str, tag: str, **kwargs: Any) -> bool:
        """Send one call to the least loaded HEALTHY member; False when none has room."""
        load = {index: len(self._tags[index]) for index in self.health.working}
        index = min(load, key=load.__getitem__, default=None)
        if index is None or load[index] >= self.in_flight:
            return False
        sent = self._manager.foreach_actor_async(
            _method(method),
            tag=tag,
            kwargs=kwargs,
            remote_actor_ids=[self._id(index)],
            healthy_only=False,  # it has its own idea of that
        )
        if sent:
            self._tags[index].append(tag)
        return bool(sent)

    def ready(self, timeout: float = 0.0) -> list[Result]:
        """Calls that ended within ``timeout`` seconds; all those of a member that was lost."""
        self.look()
        calls = self._manager.fetch_ready_async_reqs(timeout_seconds=timeout) if self._ids else []
        members = {id: index for index, id in self._ids.items()}
        results, self._lost = self._lost, []
        # What was done before its actor died is kept, so values come first.
        for call in sorted(calls, key=lambda call: not call.result_or_error.ok):
            index, answer = members[call.actor_id], call.result_or_error
            if call.tag not in self._tags[index]:
                continue  # told below, with the others of its actor
            if answer.ok:
                self._tags[index].remove(call.tag)
                results.append(Result(index, call.tag, answer.get()))
                continue
            if isinstance(answer.get(), RayActorError):
                self.note(index, HealthEvent.LOST)
            results += self._lose(index, classify(answer.get()))  # the manager forgets them all too
        for index in self.health.having(HealthState.DEAD):
            results += self._lose(index, self._silence())
        return results

    def _silence(self) -> Failure:
        return Failure(FailureKind.INFRA, f"it did not answer for {self.health.dead_after:.0f} s")

    def _lose(self, index: int, failure: Failure) -> list[Result]:
        """The end of all calls to a member that are under way."""
        lost, self._tags[index] = self._tags[index], []
        return [Result(index, tag, failure) for tag in lost]

    def ended_or_raise(self, timeout: float = 0.0) -> list[Result]:
        """``ready`` for who cannot do anything about a failure."""
        results = self.ready(timeout)
        for result in results:
            if result.failure is not None:
                raise ActorFailure(f"{self.name}-{result.actor}, {result.tag}", result.failure)
        return results

    @property
    def outstanding(self) -> int:
        """Calls whose end was not told yet."""
        return sum(map(len, self._tags)) + len(self._lost)

    # --- health ---------------------------------------------------------------------

    def note(self, index: int, event: HealthEvent) -> None:
        """What became of a member. What it answers to a question from before that is out of date."""
        self._pings.pop(index, None)
        self.health.note(index, event)

    def look(self) -> None:
        """Hear who answered and, where silence may mean death, ask all again in turn. Does not wait."""
        now = time.monotonic()
        if math.isfinite(self.health.dead_after) and now - self._probed >= PROBE_INTERVAL_S:
            self._probed = now
            self._ask(self.health.updatable)
        self._hear(PEER_FAILURE_TIMEOUT_S)

    def able(self) -> bool:
        """Whether a member may be given work. Raises ActorFailure where none will be."""
        health = self.health
        if not (health.working or health.having(HealthState.SUSPECT)):  # which may answer yet
            told = f"none may be given work: {health}"
            raise ActorFailure(self.name, Failure(FailureKind.INFRA, told))
        return bool(health.working)

    def dead(self, timeout: float = PEER_FAILURE_TIMEOUT_S) -> list[int]:
        """Ask who is gone, or says that it cannot work. One that is busy for so long is alive; but
        where silence may mean death, who stands in the way of the others must answer or is DEAD."""
        self._ask([*self.health.updatable, *self.health.having(HealthState.RESTARTING)])
        unfit, asked = set[int](), list(self._pings)
        while asked:
            refs = [self._pings[index][0] for index in asked]
            ray.wait(refs, num_returns=len(refs), timeout=timeout)
            unfit.update(self._hear(0.0))
            asked = [index for index in self._in_the_way() if index in self._pings]
        return sorted({*unfit, *self.health.having(HealthState.DEAD)})

    def _in_the_way(self) -> list[int]:
        """Members whose silence holds up more than themselves: every update waits for the STALE, and
        all work for the SUSPECT where nobody else may be given it."""
        if math.isinf(self.health.dead_after):
            return []
        suspects = [] if self.health.working else [HealthState.SUSPECT]
        return self.health.having(HealthState.STALE, *suspects)

    def _ask(self, members: Iterable[int]) -> None:
        for index in members:
            if index not in self._pings:
                ref = self.actors[index].apply.remote(_method("ping"))
                self._pings[index] = ref, time.monotonic()

    def _hear(self, grace: float) -> list[int]:
        """Note who answered, and who did not within ``grace`` seconds; returns who cannot work."""
        unfit = []
        for index, (ref, asked) in list(self._pings.items()):
            if not ray.wait([ref], timeout=0)[0]:
                if time.monotonic() - asked >= grace:
                    self.health.note(index, HealthEvent.MISSED)
                continue
            del self._pings[index]
            event = _answer(ref)
            if event is HealthEvent.UNVERIFIED and self.health[index] is HealthState.RESTARTING:
                continue  # it is not up yet
            self.health.note(index, event)
            if event is not HealthEvent.ANSWERED:
                unfit.append(index)
        return unfit

    def wrote(self, index: int | None = None) -> list[str]:
        """The last lines in the log of each process, or of a member's, on this host."""
        asked = self.present if index is None else [index]
        refs = [self._pids[actor] for i in asked if (actor := self.actors[i]) in self._pids]
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=0) if refs else ((), ())
        found = []
        for pid in map(_value, done):
            path, lines = log_tail(pid, STALL_LINES) if isinstance(pid, int) else (None, [])
            found += [f"{path.name}: {line}" for line in lines if path is not None]
        return found

    def _know(self, actors: Iterable[Any]) -> None:
        """Ask for the process of each before anything else: who hangs can not say it."""
        self._pids |= {a: a.apply.remote(_method("pid")) for a in actors if a is not None}

    def add(self, actor: Any) -> int:
        """A new member, RESTARTING until it has ``started``; returns its index."""
        self.actors.append(actor)
        self._know([actor])
        self._tags.append([])
        return self.health.add()

    def remove(self, index: int) -> None:
        """Take a member out for good and kill it. Its calls under way are lost, which the next
        ``ready`` tells: whoever asked for them asks somebody else."""
        self._part(index, "removed")
        self.note(index, HealthEvent.RETIRE)
        self.actors[index] = None

    def replace(self, index: int, actor: Any) -> None:
        """Put a new actor in the place of one, which is killed; RESTARTING until it has ``started``.

        Its calls under way are lost, which the next ``ready`` tells.
        """
        self._part(index, "replaced")
        self.note(index, HealthEvent.LOST)
        self.note(index, HealthEvent.RESTART)
        self.actors[index] = actor
        self._know([actor])

    def _part(self, index: int, how: str) -> None:
        if self.actors[index] is None:
            raise ValueError(f"{self.name}-{index} was removed; it cannot be {how}")
        self._lost += self._lose(
            index, Failure(FailureKind.INFRA, f"{self.name}-{index} was {how}")
        )
        ray.kill(self.actors[index])
        if index in self._ids:
            self._manager.remove_actor(self._ids.pop(index))

    def start(self, members: Sequence[int]) -> None:
        """Bring up who is RESTARTING, all at once, and wait for it; see ``started``."""
        self.collect("start", self._send("start", members, [{}] * len(members)), members)
        self.started(members)

    def started(self, members: Iterable[int]) -> None:
        """These are up: STALE, since nobody vouches for their weights yet."""
        for index in members:
            self.note(index, HealthEvent.STARTED)

    def updated(self, verified: Iterable[int]) -> None:
        """An update is over. These ended it verified and may work; whoever else is there may not."""
        right = set(verified)
        for index in self.health.updatable:  # one may have died since
            self.note(index, HealthEvent.VERIFIED if index in right else HealthEvent.UNVERIFIED)

    def kill(self) -> None:
        for index in self.present:
            ray.kill(self.actors[index])


def _method(name: str) -> Callable[..., Any]:
    return lambda actor, **kwargs: getattr(actor, name)(**kwargs)


def _value(ref: Any) -> Any:
    """What a call that is done gave, or a Failure."""
    try:
        return ray.get(ref)
    except RayError as error:
        return classify(error)


def _answer(ref: Any) -> HealthEvent:
    """What the answer to a ping says of who gave it."""
    try:
        return HealthEvent.UNVERIFIED if isinstance(ray.get(ref), Failure) else HealthEvent.ANSWERED
    except RayActorError:
        return HealthEvent.LOST
    except RayError:
        return HealthEvent.UNVERIFIED
