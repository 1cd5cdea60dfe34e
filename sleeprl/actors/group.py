"""A group of like actors: bounded calls in flight, results or classified failures.

Built on RLlib's FaultTolerantActorManager, which knows which actors are healthy. One that has
died is replaced while the others work; it gets work again when its weights are verified.
"""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from sleeprl.reporting.failures import ActorFailure, Failure, Kind, pid_in, reason

UNFIT = ("EngineDeadError", "StaleEngine")
"""Of an actor that lives but cannot work: vLLM's core, another process, is gone; or an engine's
weights are not verified. Named, since whoever imports vLLM waits for it."""
GRACE_S = 3.0
"""How long the others are waited for when one has failed: its peer's death may be why."""


def classify(error: BaseException) -> Failure:
    """Unknown is DATA: a bug must surface, not be retried for ever."""
    root = error.cause if isinstance(error, RayTaskError) and error.cause else error
    if isinstance(root, ActorFailure):  # of an actor that this one works with
        inner = root.failure
        return Failure(inner.kind, f"{root.where}: {inner.message}", inner.trace, inner.pid)
    if isinstance(root, RayActorError):
        if root.actor_init_failed:  # its constructor raised, which another process would do too
            last = str(root).strip().splitlines()[-1]
            return Failure(Kind.DATA, f"it did not start: {last}", str(root), pid_in(str(root)))
        return Failure(Kind.INFRA, reason(str(root)), "", pid_in(str(root)))
    lost = isinstance(root, RayError | ConnectionError | TimeoutError | MemoryError)
    lost = lost or type(root).__name__ in UNFIT
    trace = "".join(traceback.format_exception(error)[-6:])
    kind = Kind.INFRA if lost else Kind.DATA
    return Failure(kind, f"{type(root).__name__}: {root}", trace, os.getpid())


class Served:
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


class ServedAsync(Served):
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
    """Actors with one interface. Calls take keyword arguments only."""

    def __init__(self, name: str, actors: Sequence[Any], in_flight: int = 2) -> None:
        self.name = name
        self.actors = list(actors)
        self._in_flight = in_flight
        self._tags: list[list[str]] = [[] for _ in self.actors]
        self._ids = list(range(len(self.actors)))  # the manager's names for them
        self._lost: list[Result] = []

    @cached_property
    def _manager(self) -> Any:
        # Importing RLlib takes seconds; whoever only calls and waits does without.
        from ray.rllib.utils.actor_manager import FaultTolerantActorManager

        return FaultTolerantActorManager(
            self.actors, max_remote_requests_in_flight_per_actor=self._in_flight
        )

    def __len__(self) -> int:
        return len(self.actors)

    def call(self, method: str, **kwargs: Any) -> list[Any]:
        """Call every actor, wait for all, raise ActorFailure for the first that failed."""
        return self.scatter(method, [kwargs] * len(self))

    def scatter(self, method: str, per_actor: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Like ``call``, with arguments of its own for each actor."""
        return self.collect(method, self.send(method, per_actor))

    def send(self, method: str, per_actor: Sequence[Mapping[str, Any]]) -> list[Any]:
        """One call per actor, not waited for; ``collect`` takes what this returns."""
        call = _method(method)
        return [
            actor.apply.remote(call, **kw) for actor, kw in zip(self.actors, per_actor, strict=True)
        ]

    def collect(self, method: str, refs: Sequence[Any]) -> list[Any]:
        """The values of sent calls. Of several failures the one that explains the others is raised."""
        waiting, failed = list(refs), False
        while waiting and not failed:
            done, waiting = ray.wait(waiting)
            failed = any(isinstance(_value(ref), Failure) for ref in done)
        if waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=GRACE_S)
        values = [None if ref in waiting else _value(ref) for ref in refs]
        failures = [(i, v) for i, v in enumerate(values) if isinstance(v, Failure)]
        for index, failure in sorted(failures, key=lambda pair: pair[1].kind is Kind.DATA)[:1]:
            raise ActorFailure(f"{self.name}-{index}.{method}", failure)
        return values

    def ended(self, refs: Sequence[Any]) -> bool:
        """Whether ``collect`` of these would not wait for long: all are done, or one has failed."""
        done, rest = ray.wait(list(refs), num_returns=len(refs), timeout=0)
        return not rest or any(isinstance(_value(ref), Failure) for ref in done)

    def submit(self, method: str, tag: str, **kwargs: Any) -> bool:
        """Send one call to the least loaded healthy actor; False when none has room."""
        healthy = [i for i, id in enumerate(self._ids) if self._manager.is_actor_healthy(id)]
        index = min(healthy, key=lambda i: len(self._tags[i]), default=None)
        if index is None or len(self._tags[index]) >= self._in_flight:
            return False
        sent = self._manager.foreach_actor_async(
            _method(method), tag=tag, kwargs=kwargs, remote_actor_ids=[self._ids[index]]
        )
        if sent:
            self._tags[index].append(tag)
        return bool(sent)

    def ready(self, timeout: float = 0.0) -> list[Result]:
        """Calls that ended within ``timeout`` seconds; all those of an actor that was lost."""
        calls = list(self._manager.fetch_ready_async_reqs(timeout_seconds=timeout))
        results, self._lost = self._lost, []
        # What was done before its actor died is kept, so values come first.
        for call in sorted(calls, key=lambda call: not call.result_or_error.ok):
            index, answer = self._ids.index(call.actor_id), call.result_or_error
            if call.tag not in self._tags[index]:
                continue  # told below, with the others of its actor
            if answer.ok:
                self._tags[index].remove(call.tag)
                results.append(Result(index, call.tag, answer.get()))
                continue
            # The manager forgets all that such an actor was asked, and gives it no more work.
            failure = classify(answer.get())
            results += [Result(index, tag, failure) for tag in self._tags[index]]
            self._tags[index] = []
            if not isinstance(answer.get(), RayActorError):
                self._manager.set_actor_state(call.actor_id, healthy=True)
        return results

    def ended_or_raise(self, timeout: float = 0.0) -> list[Result]:
        """``ready`` for who cannot do anything about a failure."""
        results = self.ready(timeout)
        for result in results:
            if result.failure is not None:
                raise ActorFailure(f"{self.name}-{result.actor}, {result.tag}", result.failure)
        return results

    @property
    def outstanding(self) -> int:
        return sum(map(len, self._tags))

    @property
    def healthy(self) -> int:
        return int(self._manager.num_healthy_actors())

    def dead(self, timeout: float = GRACE_S) -> list[int]:
        """Who is gone, or says that it cannot work. One that is busy for so long is alive."""
        refs = self.send("ping", [{}] * len(self))
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout)
        return [i for i, ref in enumerate(refs) if ref in done and isinstance(_value(ref), Failure)]

    def replace(self, index: int, actor: Any) -> None:
        """Put a new actor in the place of one, which is killed. It gets no work until ``verified``.

        Its calls under way are lost, which the next ``ready`` tells.
        """
        lost = Failure(Kind.INFRA, f"{self.name}-{index} was replaced")
        self._lost += [Result(index, tag, lost) for tag in self._tags[index]]
        self._tags[index] = []
        ray.kill(self.actors[index])
        self._manager.remove_actor(self._ids[index])
        self._manager.add_actors([actor])
        self.actors[index], self._ids[index] = actor, max(self._manager.actor_ids())
        self._manager.set_actor_state(self._ids[index], healthy=False)

    def verified(self) -> None:
        """All members have the weights that they should have, and may work."""
        for id in self._ids:
            self._manager.set_actor_state(id, healthy=True)

    def kill(self) -> None:
        for actor in self.actors:
            ray.kill(actor)


def _method(name: str) -> Callable[..., Any]:
    return lambda actor, **kwargs: getattr(actor, name)(**kwargs)


def _value(ref: Any) -> Any:
    """What a call that is done gave, or a Failure."""
    try:
        return ray.get(ref)
    except RayError as error:
        return classify(error)
