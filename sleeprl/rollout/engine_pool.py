"""The rollout engines of a night as one thing: generate on all, send weights to all."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from sleeprl.cluster.actor_group import ActorGroup
from sleeprl.cluster.failures import ActorFailure, Failure, FailureKind
from sleeprl.cluster.health import GroupHealth, HealthEvent, HealthState
from sleeprl.cluster.remote_actor import classify
from sleeprl.cluster.runtime import create_placement_group, remove_placement_group
from sleeprl.cluster.waits import WAITS
from sleeprl.rollout.engine import EngineOptions, spawn_engine
from sleeprl.rollout.types import Completion, SamplingParams
from sleeprl.weight_sync.base import NamedTensor, WeightTransport
from sleeprl.weight_sync.factory import make_transport, transport_class
from sleeprl.weight_sync.verification import Canary, UpdateReceipt

UPDATE_TIMEOUT_S = 600.0
"""Seconds an engine may take for one step of an update."""
SHUTDOWN_TIMEOUT_S = 10.0
"""Seconds an engine may take to end by itself; vLLM's own limit is five."""
LIVENESS_TIMEOUT_S = 180.0
"""Seconds for which an engine may not answer before it is dead. They answer while they work."""


class StaleEngine(ConnectionError):
    """No engine is left whose weights are known to be right; others may be started."""


class EnginePool:
    """Engines behind an ``ActorGroup``. Versions are given by the caller and only grow.

    Only engines that ended the last update verified get work; what is known of each is the group's
    ``health``. patience: seconds after which an engine that does not answer during an update counts
    as not updated. placement: Ray's placement group of the engines, removed with them.
    """

    def __init__(
        self, group: ActorGroup, patience: float = UPDATE_TIMEOUT_S, placement: Any = None
    ) -> None:
        self.group = group
        self.version = 0
        self.placement = placement
        self._patience = patience
        self._transport: WeightTransport | None = None
        self._connected: list[Any] = []

    @classmethod
    def launch(
        cls, count: int, options: EngineOptions, cpus: float, gpus: float, engine: str = "vllm"
    ) -> EnginePool:
        """Start ``count`` engines of a kind at once and wait until all can generate.

        Raises ResourceError where the cluster has no room for them.
        """
        # Through memory weights reach this host's engines only; else one host is as good as two.
        near = transport_class(options.transport.kind).same_host
        placement = create_placement_group(count, cpus, gpus, "STRICT_PACK" if near else "PACK")
        handles = [
            spawn_engine(index, options, cpus, gpus, engine, placement) for index in range(count)
        ]
        ActorGroup("engine", handles).call("start")  # while it starts, silence means nothing
        return cls(ActorGroup("engine", handles, silence=LIVENESS_TIMEOUT_S), placement=placement)

    @property
    def health(self) -> GroupHealth:
        """What is known of each engine."""
        return self.group.health

    def lease(self, in_flight: int) -> ActorGroup:
        """Return the engines for calls of the caller's own, at most ``in_flight`` under way on each."""
        self.group.limit_in_flight(in_flight)
        return self.group

    # --- work ---------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]
    ) -> list[Completion]:
        """One completion per prompt, in their order, spread evenly over the engines."""
        return self.generate_later(prompts, sampling).wait()

    def generate_later(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]
    ) -> PendingResults:
        """The same without waiting; the engines work while the caller does something else."""
        return self._spread("generate", prompts=prompts, sampling=sampling)

    def logprobs(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """For each sequence of T ids the T-1 log-probabilities of ids 1..T-1, in nats."""
        return self._spread("logprobs", sequences=sequences).wait()

    def _spread(self, method: str, **columns: Sequence[Any]) -> PendingResults:
        self.group.poll_health()
        with WAITS.on(
            self.group.name, what="an answer", kind="generate", log_tail=self.group.log_tail
        ):
            while not self.health.working and self.health.having(HealthState.SUSPECT):
                time.sleep(0.1)  # it may answer yet; if not, it will be dead
                self.group.poll_health()
        engines = self.health.working
        if not engines:
            raise StaleEngine(f"no engine may be given work: {self.health}")
        total = len(next(iter(columns.values())))
        shares = {
            engine: {name: list(values[turn :: len(engines)]) for name, values in columns.items()}
            for turn, engine in enumerate(engines)
        }
        return PendingResults(self.group, method, self._send(method, shares), total)

    def sleep(self) -> None:
        """All engines that are there leave the device to others, until the next update."""
        UpdateRound(self, self.health.updatable).call("sleep")

    # --- weights ------------------------------------------------------------------

    def publish(
        self,
        tensors: Iterable[NamedTensor],
        canary: Canary | None = None,
        version: int | None = None,
    ) -> list[UpdateReceipt]:
        """Send weights to every engine that is there; those that end verified get work again.

        Raises StaleEngine when none does, and ActorFailure for a fault of the code.
        """
        return self.send(self.begin(version), tensors, canary)

    def begin(self, version: int | None = None) -> UpdateRound:
        """Bring what runs on every engine that is there to rest: with ``update_mode=drain`` that
        takes as long as the longest request. ``send`` must follow."""
        self.version = self.version + 1 if version is None else version
        update = UpdateRound(self, self.health.updatable)
        update.transport = self._connect(update)
        update.transport.begin(self.version)
        update.call("begin_update", version=self.version)
        return update

    def send(
        self, update: UpdateRound, tensors: Iterable[NamedTensor], canary: Canary | None = None
    ) -> list[UpdateReceipt]:
        """The rest of ``publish``."""
        transport = update.transport
        try:
            for info in transport.buckets(tensors):
                update.finish_call()  # of the bucket before, which was loaded meanwhile
                update.start_call("load_bucket", update_info=info)
            update.finish_call()
        finally:
            transport.finish()
        certificates = update.certificates(update.call("finish_update", canary=canary))
        if not any(certificate.verified for certificate in certificates):
            raise StaleEngine("; ".join(map(str, certificates)) or "no engine is left")
        return certificates

    def _connect(self, update: UpdateRound) -> WeightTransport:
        """The transport that the engines were started for, joined with those in the update."""
        if self._transport is None:
            deliveries = update.call("transport_config")
            if not deliveries:
                raise StaleEngine(
                    "no engine answers: " + "; ".join(map(str, update.failed.values()))
                )
            self._transport = make_transport(next(iter(deliveries.values())))
        taking_part = [self.group.actors[engine] for engine in update.engines]
        if self._connected != taking_part:
            if self._connected:
                self._transport.close()
            for infos in self._transport.connect(len(update.engines)):
                told = dict(zip(update.engines, infos, strict=True))
                update.start("connect", {engine: {"info": info} for engine, info in told.items()})
            update.finish_call()
            self._connected = taking_part
        return self._transport

    def disconnect(self) -> None:
        """Let go of the transport; a later update makes another."""
        if self._transport is not None:
            self._transport.close()
        self._transport, self._connected = None, []

    def shutdown(self) -> None:
        """End all engines; those that are dead, or do not answer for long, are no error."""
        try:
            self.disconnect()
            refs = self.group.send("shutdown", [{}] * len(self.group))
            if refs:
                ray.wait(refs, num_returns=len(refs), timeout=SHUTDOWN_TIMEOUT_S)
        finally:
            self.group.kill()
            remove_placement_group(self.placement)

    def _send(self, method: str, per_engine: Mapping[int, Mapping[str, Any]]) -> dict[int, Any]:
        call = lambda actor, **kwargs: getattr(actor, method)(**kwargs)  # noqa: E731
        actors = self.group.actors
        return {
            engine: actors[engine].apply.remote(call, **kw) for engine, kw in per_engine.items()
        }


class UpdateRound:
    """One update over the engines that still take part in it; who fails drops out."""

    transport: WeightTransport

    def __init__(self, pool: EnginePool, engines: Sequence[int]) -> None:
        self.pool = pool
        self.engines = list(engines)
        self.failed: dict[int, Failure] = {}
        self._under_way: tuple[str, dict[int, Any]] = "", {}

    def call(self, method: str, **kwargs: Any) -> dict[int, Any]:
        self.start_call(method, **kwargs)
        return self.finish_call()

    def start_call(self, method: str, **kwargs: Any) -> None:
        self.start(method, dict.fromkeys(self.engines, kwargs))

    def start(self, method: str, per_engine: Mapping[int, Mapping[str, Any]]) -> None:
        self._under_way = method, self.pool._send(method, per_engine)

    def finish_call(self) -> dict[int, Any]:
        """The answers to the call that is under way. Raises ActorFailure for a fault of the code."""
        (method, refs), self._under_way = self._under_way, ("", {})
        patience, group = self.pool._patience, self.pool.group
        with WAITS.on(group.name, what=method, kind="sync", log_tail=group.log_tail):
            if refs:
                ray.wait(list(refs.values()), num_returns=len(refs), timeout=patience)
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

    def certificates(self, found: Mapping[int, UpdateReceipt]) -> list[UpdateReceipt]:
        """Of all engines that were to be updated, in their order, and noted."""
        for engine, one in found.items():
            self.pool.group.note(
                engine, HealthEvent.VERIFIED if one.verified else HealthEvent.UNVERIFIED
            )
        lost = {
            engine: UpdateReceipt(
                f"{self.pool.group.name}-{engine}",
                self.pool.version,
                False,
                None,
                None,
                0.0,
                failure.message,
            )
            for engine, failure in self.failed.items()
        }
        return [one for _, one in sorted({**found, **lost}.items())]


def _answer(ref: Any) -> tuple[Any, HealthEvent]:
    """A call's value or Failure, and what a failure says of the engine."""
    try:
        return ray.get(ref, timeout=0.1), HealthEvent.UNVERIFIED
    except GetTimeoutError as error:
        return classify(error), HealthEvent.UNVERIFIED
    except RayActorError as error:
        return classify(error), HealthEvent.LOST
    except RayError as error:
        return classify(error), HealthEvent.UNVERIFIED


@dataclass(frozen=True)
class PendingResults:
    """Work spread over the engines that may not be done yet. refs: by engine."""

    group: ActorGroup
    method: str
    refs: dict[int, Any]
    total: int

    def wait(self) -> list[Any]:
        """What was asked for, in its order. Raises ActorFailure for the first that failed, or is DEAD
        before it answers."""
        merged: list[Any] = [None] * self.total
        for turn, (engine, ref) in enumerate(self.refs.items()):
            answers = self.group.wait(engine, ref, self.method)
            if isinstance(answers, Failure):
                raise ActorFailure(f"{self.group.name}-{engine}.{self.method}", answers)
            merged[turn :: len(self.refs)] = answers
        return merged
