"""Weights through shared memory on one host: written once, loaded in place, never pickled.

Two segments of memory are written in turn for as long as the sender lives. They are small
enough to stay in the processor's cache between the writer and the reader, and their pages
are made once: making them costs several times what copying does. A segment has no name in
any file system, so it needs no room in ``/dev/shm`` and a killed sender leaves nothing.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from sleeprl.weight_sync.base import (
    NamedTensor,
    TransportConfig,
    TransportError,
    WeightTransport,
    split_tensors,
)
from sleeprl.weight_sync.buckets import Mapped, plan_bucket, receive_bucket

BUCKET_BYTES = 8 << 20


class Segment:
    """Anonymous memory that another process of this user maps by ``path``."""

    def __init__(self, nbytes: int) -> None:
        handle = os.memfd_create("sleeprl-weights")
        weakref.finalize(self, os.close, handle)
        # Reserved now: full memory must say so here, not end the process later.
        os.posix_fallocate(handle, 0, nbytes)
        self.nbytes = nbytes
        self.path = f"/proc/{os.getpid()}/fd/{handle}"
        self.inode = os.fstat(handle).st_ino
        self.memory = Mapped(self.path, nbytes)


class SharedMemoryTransport(WeightTransport):
    """Copies buckets into two segments that the engines on the sender's host map."""

    same_host: ClassVar[bool] = True
    receive = staticmethod(receive_bucket)

    def __init__(self, config: TransportConfig, limit: int = BUCKET_BYTES) -> None:
        if not hasattr(os, "memfd_create"):
            raise TransportError(
                "resources.transport=shared_memory needs Linux; set resources.transport=disk"
            )
        self.limit = limit
        self._version = 0
        self._segments: list[Segment] = []

    def begin(self, version: int) -> None:
        self._version = version

    def buckets(self, tensors: Iterable[NamedTensor]) -> Iterator[dict[str, Any]]:
        for number, group in enumerate(split_tensors(tensors, self.limit)):
            bucket = plan_bucket(group, self._version)
            segment = self._segment(number % 2, bucket.layout.nbytes)
            targets = segment.memory.views(bucket.layout.text)
            for (_, target), (_, source) in zip(targets, group, strict=True):
                target.copy_(source)
            yield bucket.describe(segment.path, segment.nbytes, segment.inode)

    def _segment(self, turn: int, nbytes: int) -> Segment:
        """Return the segment whose turn it is, made larger where it is too small."""
        if turn == len(self._segments):
            self._segments.append(Segment(max(nbytes, self.limit)))
        elif self._segments[turn].nbytes < nbytes:
            self._segments[turn] = Segment(nbytes)
        return self._segments[turn]

    def close(self) -> None:
        self._segments.clear()
