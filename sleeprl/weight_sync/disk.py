"""Weights through files, for engines on another host than the trainer's."""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from sleeprl.utils.files import atomic_path
from sleeprl.weight_sync.base import (
    NamedTensor,
    TransportConfig,
    TransportError,
    WeightTransport,
    split_tensors,
)
from sleeprl.weight_sync.buckets import plan_bucket, receive_bucket

BUCKET_BYTES = 256 << 20


class DiskTransport(WeightTransport):
    """Writes buckets into a directory on a file system that all hosts share.

    A bucket's file appears whole or not at all, under a name of its own, so that no host's
    cache holds an older one. It goes when the next but one is written.
    """

    receive = staticmethod(receive_bucket)

    def __init__(self, config: TransportConfig, limit: int = BUCKET_BYTES) -> None:
        if not config.directory:
            raise TransportError("resources.transport=disk needs a directory that all hosts see")
        self.directory, self.limit = Path(config.directory), limit
        self._version = 0
        self._files: deque[Path] = deque()

    def begin(self, version: int) -> None:
        """Prepare, and remove what a killed sender left."""
        self._version = version
        self.directory.mkdir(parents=True, exist_ok=True)
        self._files.extend(self.directory.glob("*.bucket"))
        self.finish()

    def buckets(self, tensors: Iterable[NamedTensor]) -> Iterator[dict[str, Any]]:
        for group in split_tensors(tensors, self.limit):
            bucket = plan_bucket(group, self._version)
            path = (self.directory / f"{self._version}-{uuid.uuid4().hex}.bucket").resolve()
            with atomic_path(path) as whole, whole.open("wb") as file:
                for (_, tensor), offset in zip(group, bucket.layout.offsets, strict=True):
                    file.seek(offset)
                    file.write(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
                file.truncate(bucket.layout.nbytes)
            self._files.append(path)
            while len(self._files) > 2:
                self._files.popleft().unlink(missing_ok=True)
            yield bucket.describe(str(path), bucket.layout.nbytes)

    def finish(self) -> None:
        while self._files:
            self._files.popleft().unlink(missing_ok=True)

    def close(self) -> None:
        self.finish()
