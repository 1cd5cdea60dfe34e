"""A bucket: whole tensors one behind the other in a file, and the description that travels.

The receiver maps the file and loads straight from it; nothing is pickled. The layout is the same
at each update, so it travels as a text, by which both sides find the views that they have made
already: making them costs as much as copying a small model does. Beside it travel checksums of
some of the tensors, taken by the sender from what it meant to send.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from sleeprl.weight_sync.base import NamedTensor
from sleeprl.weight_sync.verification import check, checksum

ALIGNMENT = 64


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a group is; offsets and size are in bytes."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    nbytes: int

    @cached_property
    def text(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Bucket:
    """What is about to be sent: where each tensor goes, and checksums of some of them."""

    layout: Layout
    checksums: dict[str, int]

    def describe(self, path: str, nbytes: int, inode: int | None = None) -> dict[str, Any]:
        """Describe the bucket for ``receive_bucket``.

        Args:
            path: Of the file.
            nbytes: Size of the file.
            inode: Of a file that is written again and again, and kept mapped by the receiver;
                on another host its path means another file.
        """
        file = {"path": path, "nbytes": nbytes, "inode": inode}
        return {"file": file, "layout": self.layout.text, "checksums": self.checksums}


def plan_bucket(group: Sequence[NamedTensor], version: int) -> Bucket:
    """Lay tensors out one behind the other. The version picks which of them get a checksum."""
    layout = _laid_out(tuple((name, t.dtype, t.shape) for name, t in group))
    sample = (group[0], group[version % len(group)])  # in time, each
    return Bucket(layout, {name: checksum(tensor) for name, tensor in sample})


@lru_cache(maxsize=4096)
def _laid_out(group: tuple[tuple[str, torch.dtype, torch.Size], ...]) -> Layout:
    offsets, size = [], 0
    for _, dtype, shape in group:
        offsets.append(size)
        size += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return Layout(
        [name for name, _, _ in group],
        [str(dtype).removeprefix("torch.") for _, dtype, _ in group],
        [list(shape) for _, _, shape in group],
        offsets,
        size,
    )


def receive_bucket(bucket: Mapping[str, Any]) -> list[NamedTensor]:
    """Map a bucket's file, check the tensors in it, and return them; they share its memory.

    Args:
        bucket: What ``Bucket.describe`` returned: the file's path, size in bytes, and inode where
            it is one that is written again; the JSON text of a ``Layout``; the sender's checksums.

    Raises:
        CorruptedWeights: a tensor is not what was sent.
        FileNotFoundError: the file is not there, or is another one. On another host than the
            sender's, mapping would create it, full of zeros, without an error.
    """
    path, inode, nbytes = (bucket["file"][key] for key in ("path", "inode", "nbytes"))
    try:
        there = os.stat(path)
    except FileNotFoundError:
        there = None
    if there is None or there.st_size != nbytes or inode not in (None, there.st_ino):
        raise FileNotFoundError(
            f"weights {path} ({nbytes} bytes) are not on this host; with "
            "resources.transport=shared_memory engines and learner must share one: set "
            "resources.transport=disk and keep `runs` on a file system that all hosts see"
        )
    memory = Mapped(path, nbytes) if inode is None else _cached_mapping(path, inode, nbytes)
    tensors = memory.views(bucket["layout"])
    check(tensors, bucket["checksums"])
    return tensors


class Mapped:
    """The memory of a file, shared with whoever else maps it, and the tensors in it."""

    def __init__(self, path: str, nbytes: int) -> None:
        self.storage: Any = torch.UntypedStorage.from_file(path, shared=True, nbytes=nbytes)
        self._views: dict[str, list[NamedTensor]] = {}

    def views(self, layout: str) -> list[NamedTensor]:
        """Return the tensors of a layout's text, which are made once."""
        if layout not in self._views:
            self._views[layout] = list(_views(self.storage, Layout(**json.loads(layout))))
        return self._views[layout]


@lru_cache(maxsize=2)  # as many as a sender has: mapping again costs more than copying
def _cached_mapping(path: str, inode: int, nbytes: int) -> Mapped:
    return Mapped(path, nbytes)


def _views(storage: torch.UntypedStorage, layout: Layout) -> Iterator[NamedTensor]:
    memory: Tensor = torch.empty(0, dtype=torch.uint8)
    memory.set_(storage)  # type: ignore[call-overload]
    columns = (layout.names, layout.dtypes, layout.shapes, layout.offsets)
    for name, dtype_name, shape, offset in zip(*columns, strict=True):
        dtype = getattr(torch, dtype_name)
        own = memory.narrow(0, offset, math.prod(shape) * dtype.itemsize)
        yield name, own.view(dtype).view(shape)
