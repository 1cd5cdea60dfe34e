"""One weight update over the engines that still take part in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from sleeprl.cluster.actor_group import ActorGroup
from sleeprl.cluster.failures import ActorFailure, Failure, FailureKind
from sleeprl.cluster.health import HealthEvent
from sleeprl.cluster.remote_actor import classify
from sleeprl.cluster.waits import WAITS
from sleeprl.weight_sync.verification import UpdateReceipt


class UpdateRound:
    """Calls the engines step by step; an engine that fails drops out."""

    def __init__(
        self, group: ActorGroup, engines: Sequence[int], version: int, timeout: float
    ) -> None:
        """
        Args:
            group: The engines' group.
            engines: The members that take part.
            version: The policy version that they are to have.
            timeout: Seconds that a step may take.
        """
        self.group = group
        self.engines = list(engines)
        self.version = version
        self.failed: dict[int, Failure] = {}
        self._timeout = timeout
        self._method = ""
        self._refs: dict[int, Any] = {}
        """The call that is under way, by engine."""

    def call(self, method: str, **kwargs: Any) -> dict[int, Any]:
        """Call all engines and return their answers; see ``finish_call``."""
        self.start_call(method, dict.fromkeys(self.engines, kwargs))
        return self.finish_call()

    def start_call(self, method: str, per_engine: Mapping[int, Mapping[str, Any]]) -> None:
        """Call engines with arguments of their own, without waiting."""
        self._method = method
        self._refs = {
            engine: self.group.call_one(engine, method, **kwargs)
            for engine, kwargs in per_engine.items()
        }

    def finish_call(self) -> dict[int, Any]:
        """Wait for the call that is under way, and return the answers by engine.

        Raises:
            ActorFailure: for a fault of the code. Any other failure takes the engine out.
        """
        method, refs, self._refs = self._method, self._refs, {}
        group = self.group
        with WAITS.on(group.name, what=method, kind="sync", log_tail=group.log_tail):
            if refs:
                ray.wait(list(refs.values()), num_returns=len(refs), timeout=self._timeout)
        answers = {}
        for engine, ref in refs.items():
            value, event = _answer(ref)
            if not isinstance(value, Failure):
                answers[engine] = value
                continue
            where = f"{group.name}-{engine}.{method}"
            if value.kind is FailureKind.FATAL:
                raise ActorFailure(where, value)
            group.note(engine, event)
            self.failed[engine] = Failure(value.kind, f"{where}: {value.message}")
            self.engines.remove(engine)
        return answers

    def settle(self, receipts: Mapping[int, UpdateReceipt]) -> list[UpdateReceipt]:
        """Note how the update ended, and return a receipt for every engine that it began with."""
        for engine, receipt in receipts.items():
            event = HealthEvent.VERIFIED if receipt.verified else HealthEvent.UNVERIFIED
            self.group.note(engine, event)
        lost = {engine: self._lost_receipt(engine) for engine in self.failed}
        return [receipt for _, receipt in sorted({**receipts, **lost}.items())]

    def _lost_receipt(self, engine: int) -> UpdateReceipt:
        return UpdateReceipt(
            engine=f"{self.group.name}-{engine}",
            version=self.version,
            verified=False,
            difference=None,
            tolerance=None,
            seconds=0.0,
            error=self.failed[engine].message,
        )


def _answer(ref: Any) -> tuple[Any, HealthEvent]:
    """Return a call's value or Failure, and what a failure says of the engine."""
    try:
        return ray.get(ref, timeout=0.1), HealthEvent.UNVERIFIED
    except GetTimeoutError as error:
        return classify(error), HealthEvent.UNVERIFIED
    except RayActorError as error:
        return classify(error), HealthEvent.LOST
    except RayError as error:
        return classify(error), HealthEvent.UNVERIFIED
