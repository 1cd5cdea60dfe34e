"""The rollout engines of a night as one thing: generate on all, send weights to all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from torch import Tensor

from sleeprl.actors.engine import Completion, EngineOptions, Sampling, VLLMEngine
from sleeprl.actors.group import ActorGroup
from sleeprl.weights.shared_memory import as_update_info, discard, pack
from sleeprl.weights.verify import Canary, Certificate


class StaleEngine(RuntimeError):
    """An engine did not end an update verified, so nothing it writes can be trusted."""


class Fleet:
    """Engines behind an ``ActorGroup``. Versions are given by the caller and only grow."""

    def __init__(self, group: ActorGroup) -> None:
        self.group = group
        self.version = 0
        self.certificates: list[Certificate] = []

    @classmethod
    def launch(cls, count: int, options: EngineOptions, cpus: float, gpus: float) -> Fleet:
        """Start ``count`` engines at once and wait until all can generate."""
        actor = ray.remote(VLLMEngine).options(num_cpus=cpus, num_gpus=gpus, max_concurrency=256)
        handles = [actor.remote(name=f"engine-{i}", options=options) for i in range(count)]
        fleet = cls(ActorGroup("engine", handles))
        fleet.group.call("start")
        return fleet

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sequence[Sampling]
    ) -> list[Completion]:
        """One completion per prompt, in their order, spread evenly over the engines."""
        return self.generate_later(prompts, sampling).wait()

    def generate_later(self, prompts: Sequence[list[int]], sampling: Sequence[Sampling]) -> Pending:
        """The same without waiting; the engines work while the caller does something else."""
        return self._spread("generate", prompts=prompts, sampling=sampling)

    def logprobs(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """For each sequence of T ids the T-1 log-probabilities of ids 1..T-1, in nats."""
        return self._spread("logprobs", sequences=sequences).wait()

    def _spread(self, method: str, **columns: Sequence[Any]) -> Pending:
        count = len(self.group)
        total = len(next(iter(columns.values())))
        shares = [
            {name: list(values[index::count]) for name, values in columns.items()}
            for index in range(count)
        ]
        return Pending(self.group, method, self.group.send(method, shares), total)

    def publish(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        canary: Canary | None = None,
        version: int | None = None,
    ) -> list[Certificate]:
        """Send weights to every engine, in flight; each ends verified or this raises StaleEngine."""
        self.version = self.version + 1 if version is None else version
        self.group.call("begin_update", version=self.version)
        for bucket in pack(tensors):
            try:
                self.group.call("load_bucket", update_info=as_update_info(bucket))
            finally:
                discard(bucket)
        certificates = self.group.call("finish_update", canary=canary)
        self.certificates = certificates
        stale = [c for c in certificates if not c.verified]
        if stale:
            raise StaleEngine("; ".join(map(str, stale)))
        return certificates

    def shutdown(self) -> None:
        try:
            self.group.call("shutdown")
        finally:
            self.group.kill()


@dataclass(frozen=True)
class Pending:
    """Work spread over the engines that may not be done yet."""

    group: ActorGroup
    method: str
    refs: list[Any]
    total: int

    def wait(self) -> list[Any]:
        merged: list[Any] = [None] * self.total
        for index, answers in enumerate(self.group.collect(self.method, self.refs)):
            merged[index :: len(self.refs)] = answers
        return merged
