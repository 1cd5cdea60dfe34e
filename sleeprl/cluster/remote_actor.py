"""What makes an actor a member of an ``ActorGroup``, and how its failures cross to the caller."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from sleeprl.cluster.failures import ActorFailure, Failure, FailureKind, pid_in, short_reason

UNFIT = ("EngineDeadError", "StaleEngine")
"""Errors of an actor that lives but cannot work: vLLM's core, another process, is gone; or no
engine's weights are verified. By name, because importing vLLM takes seconds."""


def classify(error: BaseException) -> Failure:
    """Turn an error into a ``Failure``. An unknown one is FATAL: a bug is shown, not retried."""
    root = error.cause if isinstance(error, RayTaskError) and error.cause else error
    if isinstance(root, ActorFailure):  # of an actor that this one works with
        inner = root.failure
        return Failure(inner.kind, f"{root.where}: {inner.message}", inner.trace, inner.pid)
    if isinstance(root, RayActorError):
        if root.actor_init_failed:  # its constructor raised, which another process would do too
            last = str(root).strip().splitlines()[-1]
            return Failure(
                FailureKind.FATAL, f"it did not start: {last}", str(root), pid_in(str(root))
            )
        return Failure(FailureKind.RETRYABLE, short_reason(str(root)), "", pid_in(str(root)))
    lost = isinstance(root, RayError | ConnectionError | TimeoutError | MemoryError)
    lost = lost or type(root).__name__ in UNFIT
    trace = "".join(traceback.format_exception(error)[-6:])
    kind = FailureKind.RETRYABLE if lost else FailureKind.FATAL
    return Failure(kind, f"{type(root).__name__}: {root}", trace, os.getpid())


class RemoteActor:
    """Base of an actor's class. ``apply`` has the name by which RLlib's manager calls it."""

    def ping(self) -> str:
        """Answer that the actor is there; an error says that it cannot work."""
        return "pong"

    def pid(self) -> int:
        """Return the number of the actor's process."""
        return os.getpid()

    def apply(self, func: Callable[..., Any], **kwargs: Any) -> Any:
        """Call ``func`` with this actor; return its value, or a Failure in place of an error."""
        try:
            return func(self, **kwargs)
        except Exception as error:
            return classify(error)


class AsyncRemoteActor(RemoteActor):
    """Base of an actor's class whose methods are coroutines."""

    async def apply(self, func: Callable[..., Any], **kwargs: Any) -> Any:  # type: ignore[override]
        """Await ``func`` with this actor; return its value, or a Failure in place of an error."""
        try:
            value = func(self, **kwargs)
            return await value if inspect.isawaitable(value) else value
        except Exception as error:
            return classify(error)


def method_call(name: str) -> Callable[..., Any]:
    """Return the function that ``apply`` takes for a method of that name."""
    return lambda actor, **kwargs: getattr(actor, name)(**kwargs)


def value_of(ref: Any) -> Any:
    """Return what a finished call gave; a Failure where it raised or its actor is gone."""
    try:
        return ray.get(ref)
    except RayError as error:
        return classify(error)
