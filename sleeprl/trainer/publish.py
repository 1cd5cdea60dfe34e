"""Send a trainer's weights to the engines, with the proof that they arrived."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from sleeprl.cluster.actor_group import ActorGroup
from sleeprl.cluster.waits import WAITS
from sleeprl.memory.checkpoint import EXPERT, WEIGHTS
from sleeprl.pretrained import save_tensors
from sleeprl.rollout.engine_pool import LIVENESS_TIMEOUT_S, EnginePool
from sleeprl.trainer.trainer import Trainer
from sleeprl.utils.files import atomic_path
from sleeprl.weight_sync.base import NamedTensor, StuckTransport
from sleeprl.weight_sync.verification import Canary

CANARY = "canary.json"


def publish_weights(
    learner: Trainer, pool: EnginePool, canary: list[int], version: int | None = None
) -> dict[str, float]:
    """Send what was trained to every engine, in flight. Collective over the ranks.

    Args:
        learner: The trainer, the same call on each of its ranks.
        pool: Rank 0's engines.
        canary: Token ids that both sides score afterwards.
        version: Of these weights; by default the one after the pool's.

    Returns:
        On rank 0: seconds that generation stood still, the largest difference of the two sides in
        nats, and how many engines did not end verified. Elsewhere nothing.

    Raises:
        StuckTransport: The transport hangs, which leaves the other ranks in a gather: the run has
            to end.
    """
    expected = learner.make_canary(canary)
    if learner.options.gpu and learner.options.colocated:
        torch.cuda.empty_cache()  # engines that slept wake up now
    tensors = learner.export()
    if learner.rank != 0:
        learner.long_barrier()
        for _ in tensors:  # the gathers are collective
            pass
        return {}
    try:
        try:
            update = pool.begin(version)
        finally:
            learner.long_barrier()  # while engines drain, no rank waits in a gather
        certificates = pool.send(update, tensors, expected)
    except StuckTransport:
        tensors = iter(())  # a gather beside the collective that hangs would hang as well
        raise
    finally:
        for _ in tensors:  # also when an engine died: the other ranks are in these gathers
            pass
    verified = [certificate for certificate in certificates if certificate.verified]
    return {
        "sync_seconds": max(c.seconds for c in verified),
        "canary": max(c.difference or 0.0 for c in verified),
        "stale_engines": float(len(certificates) - len(verified)),
    }


def publish_from_gpu(
    pool: EnginePool, tensors: Iterable[NamedTensor], canary: Canary | None, gpus: float
) -> None:
    """Call ``EnginePool.publish`` in a process that has GPUs: between GPUs the driver cannot send."""
    version = pool.version + 1
    send = ray.remote(_send).options(num_cpus=0, num_gpus=gpus)
    with WAITS.on("the sender", what="all weights", kind="sync"):
        verified = ray.get(send.remote(pool.group.actors, version, dict(tensors), canary))
    pool.record_update(version, verified)


def _send(
    engines: Sequence[Any], version: int, tensors: Mapping[str, Tensor], canary: Canary | None
) -> list[int]:
    """Return the numbers of the engines that ended verified."""
    pool = EnginePool(ActorGroup("engine", engines, silence=LIVENESS_TIMEOUT_S))
    pool.publish(tensors.items(), canary, version)
    pool.disconnect()
    return pool.health.working


def save_trained(learner: Trainer, directory: Path, canary: list[int]) -> None:
    """Write what was trained, and the canary of an engine that has it. Collective.

    A model that grows writes its expert alone, one that is trained in full all that it exports.
    """
    grown = learner.options.slot is not None
    tensors = learner.gather_expert() if grown else dict(learner.export())
    expected = learner.make_canary(canary)
    if learner.rank == 0:
        expected.save(directory / CANARY)
        with atomic_path(directory / (EXPERT if grown else WEIGHTS)) as path:
            save_tensors(tensors, path)
