"""How new weights travel from the learner to the engines: the contract, and the choice.

An update is ``begin(version)``, every bucket, ``finish``, and then each engine's certificate:
it ends verified at the new version, or stale and gets no work. Imports no ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

NamedTensor = tuple[str, Tensor]
"""A tensor under its name in the checkpoint."""


ON_ONE_HOST = ("shared_memory", "ipc")
"""Kinds of delivery that do not leave the sender's host."""
BETWEEN_GPUS = ("nccl", "ipc")
"""Kinds of delivery whose sender must have a GPU."""


@dataclass(frozen=True)
class TransportConfig:
    """kind: ``shared_memory``, ``disk``, ``nccl`` or ``ipc``. mode: what becomes of running
    requests: ``keep`` freezes them, ``drain`` waits for them, ``abort`` ends them and goes on
    from the tokens they have. directory: of ``disk``, seen by learner and engines alike.
    ranks: processes of one engine, each of which takes the whole tensors and keeps its shard."""

    kind: str = "shared_memory"
    mode: str = "keep"
    directory: str = ""
    ranks: int = 1


class WeightTransport(Protocol):
    """The sender's side.

    What ``connect`` and ``buckets`` yield must be under way to the engines before the
    generator goes on: a collective transport then does its own part of it. The memory
    behind a bucket is written again when the next but one is asked for, so that a bucket
    is packed while the one before it is loaded, and no more than two exist. ``tensors``
    is read to its end in the caller's thread, because its gathers are collective.
    """

    backend: str
    """Name of the receiving side with vLLM's factory."""

    def connect(self, engines: int) -> Iterator[list[dict[str, Any]]]:
        """Once for each set of engines: what each of them is told to join with, if anything."""
        ...

    def begin(self, version: int) -> None: ...

    def buckets(self, tensors: Iterable[NamedTensor]) -> Iterator[dict[str, Any]]:
        """What ``load_bucket`` of every engine is called with: plain data, whole tensors."""
        ...

    def finish(self) -> None:
        """All engines have loaded, or failed to."""
        ...

    def close(self) -> None: ...


def make_transport(delivery: TransportConfig) -> WeightTransport:
    """Raises TransportError for one that this machine cannot run."""
    if delivery.kind == "shared_memory":
        from sleeprl.weight_sync.shared_memory import SharedMemoryTransport

        return SharedMemoryTransport()
    if delivery.kind == "disk":
        from sleeprl.weight_sync.disk import DiskTransport

        return DiskTransport(delivery.directory)
    from sleeprl.weight_sync.gpu import IpcTransport, NcclTransport

    return NcclTransport(delivery.ranks) if delivery.kind == "nccl" else IpcTransport()


class TransportError(RuntimeError):
    """A transport that cannot work here; the message names the setting and a fix."""


class StuckTransport(TransportError):
    """A thread of this process is in a collective that will not end. Another collective beside it
    may hang too, so the process must take part in none."""


def split(tensors: Iterable[NamedTensor], limit: int) -> Iterator[list[NamedTensor]]:
    """Whole tensors, in their order, at most ``limit`` bytes together; or one that is larger.

    Also of parameters in a ZeRO-3 partition, which say themselves that they have no elements.
    No more than one group and the tensor after it are held.
    """
    group: list[NamedTensor] = []
    size = 0
    for name, tensor in tensors:
        nbytes = getattr(tensor, "ds_numel", tensor.numel()) * tensor.element_size()
        if group and size + nbytes > limit:
            yield group
            group, size = [], 0
        group.append((name, tensor))
        size += nbytes
    if group:
        yield group
