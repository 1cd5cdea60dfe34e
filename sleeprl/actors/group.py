"""A group of like actors: bounded calls in flight, results or classified failures.

Built on RLlib's FaultTolerantActorManager, which knows which actors are healthy.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError


class Kind(StrEnum):
    """INFRA may be retried elsewhere; DATA is a fault of the work or of the code, and is loud."""

    INFRA = "infra"
    DATA = "data"


@dataclass(frozen=True)
class Failure:
    """A call that failed. Made on the actor's side: exception types are lost on the way."""

    kind: Kind
    message: str
    trace: str = ""


class ActorFailure(RuntimeError):
    """Raised where a failed call cannot be retried."""

    def __init__(self, where: str, failure: Failure) -> None:
        self.failure = failure
        super().__init__(
            f"{where} failed ({failure.kind}): {failure.message}\n{failure.trace}".rstrip()
        )


def classify(error: BaseException) -> Failure:
    """Unknown is DATA: a bug must surface, not be retried for ever."""
    root = error.cause if isinstance(error, RayTaskError) and error.cause else error
    lost = isinstance(root, RayError | ConnectionError | TimeoutError | MemoryError)
    trace = "".join(traceback.format_exception(error)[-6:])
    return Failure(Kind.INFRA if lost else Kind.DATA, f"{type(root).__name__}: {root}", trace)


class Served:
    """What an actor needs to be a member of an ``ActorGroup``."""

    def ping(self) -> str:
        return "pong"

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
        self._load = dict.fromkeys(range(len(actors)), 0)

    @cached_property
    def _manager(self) -> Any:
        # Importing RLlib takes seconds; whoever only calls and waits does without.
        from ray.rllib.utils.actor_manager import FaultTolerantActorManager

        return FaultTolerantActorManager(
            self.actors, max_remote_requests_in_flight_per_actor=self._in_flight
        )

    def __len__(self) -> int:
        return len(self._load)

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
        values = []
        for index, ref in enumerate(refs):
            try:
                value = ray.get(ref)
            except RayError as error:
                value = classify(error)
            if isinstance(value, Failure):
                raise ActorFailure(f"{self.name}-{index}.{method}", value)
            values.append(value)
        return values

    def submit(self, method: str, tag: str, **kwargs: Any) -> bool:
        """Send one call to the least loaded healthy actor; False when none has room."""
        healthy = self._manager.healthy_actor_ids()
        actor = min(healthy, key=self._load.__getitem__, default=None)
        if actor is None or self._load[actor] >= self._in_flight:
            return False
        sent = self._manager.foreach_actor_async(
            _method(method), tag=tag, kwargs=kwargs, remote_actor_ids=[actor]
        )
        self._load[actor] += sent
        return bool(sent)

    def ready(self, timeout: float = 0.0) -> list[Result]:
        """Calls that ended within ``timeout`` seconds."""
        results = []
        for call in self._manager.fetch_ready_async_reqs(timeout_seconds=timeout):
            self._load[call.actor_id] -= 1
            answer = call.result_or_error
            value = answer.get() if answer.ok else classify(answer.get())
            results.append(Result(call.actor_id, call.tag, value))
        return results

    @property
    def outstanding(self) -> int:
        return sum(self._load.values())

    @property
    def healthy(self) -> int:
        return int(self._manager.num_healthy_actors())

    def kill(self) -> None:
        for actor in self.actors:
            ray.kill(actor)


def _method(name: str) -> Callable[..., Any]:
    return lambda actor, **kwargs: getattr(actor, name)(**kwargs)
