"""How new weights travel from the trainer to the engines: the contract of a transport.

An update is ``begin(version)``, every bucket, ``finish``, and then each engine's receipt:
it ends verified at the new version, or stale and gets no work. Imports no ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

NamedTensor = tuple[str, Tensor]
"""A tensor under its name in the checkpoint."""


@dataclass(frozen=True)
class TransportConfig:
    """How an engine wants to be sent weights."""

    kind: str = "shared_memory"
    """A plug-in of kind ``transport``: a short name or a dotted path."""
    mode: str = "keep"
    """What becomes of running requests: ``keep`` freezes them, ``drain`` waits for them, ``abort``
    ends them and goes on from the tokens they have."""
    directory: str = ""
    """For transports through files: a directory that trainer and engines see alike."""
    ranks: int = 1
    """Processes of one engine, each of which takes the whole tensors and keeps its shard."""


class WeightTransport(Protocol):
    """A way for weights from the trainer into the engines: both of its sides.

    A plug-in of kind ``transport`` is a subclass. The trainer's process makes one object of it
    with the ``TransportConfig`` of the engines; engines call ``receive`` of the class alone.

    Guarantees that an implementation gives:

    * What ``connect`` and ``buckets`` yield is under way to the engines before the generator goes
      on: a collective transport then does its own part of it.
    * The memory behind a bucket stays as it is until the next but one is requested, so that a
      bucket is packed while the one before it is loaded.
    * ``tensors`` is read to its end in the caller's thread, because its gathers are collective.
    """

    same_host: ClassVar[bool] = False
    """Whether it reaches engines on the sender's host only."""
    needs_gpu: ClassVar[bool] = False
    """Whether trainer and engines must have GPUs."""
    shares_gpu: ClassVar[bool] = True
    """Whether trainer and engine may be on one GPU."""
    spans_gpus: ClassVar[bool] = True
    """Whether one engine may be spread over several GPUs."""
    vllm_backend: ClassVar[str | None] = None
    """Name of a receiver that vLLM has itself, which replaces ``receive``; no other engine can then
    be sent weights. None for a transport that every engine receives by ``receive``."""
    vllm_environment: ClassVar[Mapping[str, str]] = {}
    """Variables that a vLLM engine needs for it."""

    def __init__(self, config: TransportConfig) -> None: ...

    def connect(self, engines: int) -> Iterator[list[dict[str, Any]]]:
        """Yield what each of so many engines needs to join, where there is something.

        Runs once for each set of engines, also after ``close``.
        """
        yield from ()

    def begin(self, version: int) -> None:
        """Prepare for the buckets of a version."""

    def buckets(self, tensors: Iterable[NamedTensor]) -> Iterator[dict[str, Any]]:
        """Pack tensors and yield, for each bucket, what ``receive`` needs of it: plain data."""
        ...

    @staticmethod
    def receive(bucket: Mapping[str, Any]) -> Iterable[NamedTensor]:
        """Return the whole tensors of a bucket. Runs in every process of every engine.

        Raises:
            Exception: anything; the engine's update then fails and its receipt says why.
        """
        raise NotImplementedError

    def finish(self) -> None:
        """Clean up after the last bucket: all engines have loaded, or failed to."""

    def close(self) -> None:
        """Let go of what is held between updates. ``connect`` may follow."""


class TransportError(RuntimeError):
    """A transport that cannot work here; the message names the setting and a fix."""


class StuckTransport(TransportError):
    """A thread of this process is in a collective that will not end.

    Another collective beside it may hang too, so the process must take part in none.
    """


def split_tensors(tensors: Iterable[NamedTensor], limit: int) -> Iterator[list[NamedTensor]]:
    """Group whole tensors in their order. No more than one group and the next tensor are held.

    Args:
        tensors: Also parameters of a ZeRO-3 partition, which report that they have no elements.
        limit: The most bytes of a group; a larger tensor has one to itself.
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
