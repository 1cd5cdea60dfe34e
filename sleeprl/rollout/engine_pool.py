"""Rollout engines as one thing: generate on all of them, send weights to all of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from sleeprl.cluster.actor_group import ActorGroup
from sleeprl.cluster.failures import ActorFailure, Failure
from sleeprl.cluster.health import GroupHealth, HealthState
from sleeprl.cluster.runtime import create_placement_group, remove_placement_group
from sleeprl.cluster.waits import WAITS
from sleeprl.rollout.engine import EngineOptions, spawn_engine
from sleeprl.rollout.types import Completion, SamplingParams
from sleeprl.rollout.update_round import UpdateRound
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
    """Rollout engines that generate with the weights that a trainer publishes.

    It needs a running Ray (``ray.init()``) and no night:

        pool = EnginePool.launch(2, options, cpus=1, gpus=0)
        completions = pool.generate(prompts, sampling)
        receipts = pool.publish(model.state_dict().items(), canary)
        pool.shutdown()

    Guarantees:

    * Only engines that ended the last update verified get work; what is known of each is in
      ``health``.
    * ``version`` is advanced by the receipts of an update, and by nothing else.
    """

    def __init__(
        self,
        group: ActorGroup,
        update_timeout: float = UPDATE_TIMEOUT_S,
        placement: Any = None,
        version: int = 0,
    ) -> None:
        """
        Args:
            group: The engines. ``launch`` makes one.
            update_timeout: Seconds after which an engine that does not answer a step of an update
                counts as not updated.
            placement: Ray's placement group of the engines, which is removed with them.
            version: The policy version of the weights that they hold.
        """
        self.group = group
        self.placement = placement
        self._version = version
        self._update_timeout = update_timeout
        self._transport: WeightTransport | None = None
        self._connected: list[Any] = []

    @classmethod
    def launch(
        cls, count: int, options: EngineOptions, cpus: float, gpus: float, engine: str = "vllm"
    ) -> EnginePool:
        """Start engines at once and wait until all can generate.

        Args:
            count: How many.
            options: What each of them is started with.
            cpus: Cores that each reserves.
            gpus: GPUs that each reserves.
            engine: A plug-in of kind ``engine``: ``vllm``, ``torch``, or a dotted path.

        Raises:
            ResourceError: the cluster has no room for them.
            ActorFailure: an engine did not start.
        """
        # A transport of one host reaches no other; else one host is as good as two.
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

    @property
    def version(self) -> int:
        """The policy version that the last update sent."""
        return self._version

    def lease(self, in_flight: int) -> ActorGroup:
        """Return the engines for calls of the caller's own, at most ``in_flight`` under way on each."""
        self.group.limit_in_flight(in_flight)
        return self.group

    # --- work ---------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]
    ) -> list[Completion]:
        """Generate one response per prompt, spread evenly over the engines.

        Args:
            prompts: Token ids of each.
            sampling: How to sample each.

        Returns:
            One completion per prompt, in their order.

        Raises:
            StaleEngine: no engine may be given work.
            ActorFailure: an engine failed, or is DEAD before it answers.
        """
        return self.generate_later(prompts, sampling).wait()

    def generate_later(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]
    ) -> PendingResults:
        """Like ``generate`` without waiting; the engines work while the caller does something else."""
        return self._spread("generate", prompts=prompts, sampling=sampling)

    def logprobs(
        self, sequences: Sequence[list[int]], starts: Sequence[int] | None = None
    ) -> list[list[float]]:
        """Score texts with the engines' weights.

        Args:
            sequences: Token ids of each.
            starts: First scored id of each, by default 1; what precedes it is read once for all alike.

        Returns:
            For each sequence of T ids the log-probabilities of ids start..T-1, in nats.
        """
        starts = [1] * len(sequences) if starts is None else starts
        return self._spread("logprobs", sequences=sequences, starts=starts).wait()

    def _spread(self, method: str, **columns: Sequence[Any]) -> PendingResults:
        group = self.group
        group.poll_health()
        with WAITS.on(group.name, what="an answer", kind="generate", log_tail=group.log_tail):
            while not self.health.working and self.health.having(HealthState.SUSPECT):
                time.sleep(0.1)  # it may answer yet; if not, it will be dead
                group.poll_health()
        engines = self.health.working
        if not engines:
            raise StaleEngine(f"no engine may be given work: {self.health}")
        refs = {}
        for turn, engine in enumerate(engines):
            share = {name: list(values[turn :: len(engines)]) for name, values in columns.items()}
            refs[engine] = group.call_one(engine, method, **share)
        return PendingResults(group, method, refs, len(next(iter(columns.values()))))

    def sleep(self) -> None:
        """Let all present engines leave the device to others, until the next update."""
        self._round(self.version).call("sleep")

    # --- weights ------------------------------------------------------------------

    def publish(
        self,
        tensors: Iterable[NamedTensor],
        canary: Canary | None = None,
        version: int | None = None,
    ) -> list[UpdateReceipt]:
        """Send weights to every present engine; those that end verified get work again.

        Requests that run meanwhile lose no token.

        Args:
            tensors: Whole tensors under their names in the checkpoint; all of them, or those that
                changed. Parts that an engine fuses, such as gate and up projections, go together.
            canary: A text and the log-probabilities that the new weights give it. Without one,
                only checksums prove what arrived.
            version: Of these weights; by default the one after ``version``.

        Returns:
            One receipt per engine, in order.

        Raises:
            StaleEngine: no engine ended verified.
            ActorFailure: for a fault of the code.
        """
        return self.send(self.begin(version), tensors, canary)

    def begin(self, version: int | None = None) -> UpdateRound:
        """Bring what runs on every present engine to rest. ``send`` must follow.

        With ``update_mode=drain`` that takes as long as the longest request.
        """
        update = self._round(self.version + 1 if version is None else version)
        self._connect(update).begin(update.version)
        update.call("begin_update", version=update.version)
        return update

    def send(
        self, update: UpdateRound, tensors: Iterable[NamedTensor], canary: Canary | None = None
    ) -> list[UpdateReceipt]:
        """Send weights to engines that are at rest; see ``publish``."""
        transport = self._transport
        if transport is None:
            raise RuntimeError("send() must follow begin()")
        try:
            for info in transport.buckets(tensors):
                update.finish_call()  # of the bucket before, which was loaded meanwhile
                update.start_call(
                    "load_bucket", {engine: {"update_info": info} for engine in update.engines}
                )
            update.finish_call()
        finally:
            transport.finish()
        receipts = update.settle(update.call("finish_update", canary=canary))
        self._version = update.version
        if not any(receipt.verified for receipt in receipts):
            raise StaleEngine("; ".join(map(str, receipts)) or "no engine is left")
        return receipts

    def record_update(self, version: int, verified: Iterable[int] | None = None) -> None:
        """Take over the receipts of updates that another process sent to these engines.

        Args:
            version: Of the last of them.
            verified: The engines that ended it verified; None where ``health`` knows already.
        """
        self._version = version
        if verified is not None:
            self.group.updated(verified)

    def _round(self, version: int) -> UpdateRound:
        return UpdateRound(self.group, self.health.updatable, version, self._update_timeout)

    def _connect(self, update: UpdateRound) -> WeightTransport:
        """Return the transport that the engines were started for, connected to those in the update."""
        if self._transport is None:
            configs = update.call("transport_config")
            if not configs:
                failures = "; ".join(map(str, update.failed.values()))
                raise StaleEngine(f"no engine answers: {failures}")
            self._transport = make_transport(next(iter(configs.values())))
        taking_part = [self.group.actors[engine] for engine in update.engines]
        if self._connected != taking_part:
            if self._connected:
                self._transport.close()
            for infos in self._transport.connect(len(update.engines)):
                pairs = zip(update.engines, infos, strict=True)
                update.start_call("connect", {engine: {"info": info} for engine, info in pairs})
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


@dataclass(frozen=True)
class PendingResults:
    """Work spread over the engines, which may not be done yet."""

    group: ActorGroup
    method: str
    refs: dict[int, Any]
    """Each engine's call."""
    total: int
    """How many results there will be."""

    def wait(self) -> list[Any]:
        """Return the results in the order of the requests.

        Raises:
            ActorFailure: for the first call that failed, or whose engine is DEAD before it answers.
        """
        merged: list[Any] = [None] * self.total
        for turn, (engine, ref) in enumerate(self.refs.items()):
            answers = self.group.wait(engine, ref, self.method)
            if isinstance(answers, Failure):
                raise ActorFailure(f"{self.group.name}-{engine}.{self.method}", answers)
            merged[turn :: len(self.refs)] = answers
        return merged
