"""A bucket: whole tensors one behind the other in a file, and the description that travels.

The receiver maps the file and loads straight from it; nothing is pickled. The description
carries checksums of some of the tensors, taken by the sender from what it meant to send.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sleeprl.weights.transport import Named
from sleeprl.weights.verify import check, checksum, is_sampled

BACKEND = "sleeprl"
"""Under this name vLLM knows the receiver of such files."""
ALIGNMENT = 64


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a group is: names, dtypes, shapes, and offsets in bytes."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    nbytes: int
    checksums: dict[str, int]


def lay_out(group: Sequence[Named], version: int) -> Layout:
    offsets, size = [], 0
    for _, tensor in group:
        offsets.append(size)
        size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    return Layout(
        [name for name, _ in group],
        [str(tensor.dtype).removeprefix("torch.") for _, tensor in group],
        [list(tensor.shape) for _, tensor in group],
        offsets,
        size,
        {
            name: checksum(tensor)
            for number, (name, tensor) in enumerate(group)
            if number == 0 or is_sampled(name, version)
        },
    )


def describe(path: str, nbytes: int, layout: Layout, inode: int | None = None) -> dict[str, Any]:
    """The update info. nbytes: of the file. inode: of one that is written again and again, and
    is kept mapped; its path means another file on another host."""
    return {"file": {"path": path, "nbytes": nbytes, "inode": inode}, "layout": vars(layout)}


def receive(
    file: dict[str, Any], layout: dict[str, Any]
) -> tuple[torch.UntypedStorage, list[Named]]:
    """The file's memory and the tensors in it, after their checksums.

    Raises Corrupted for a tensor that is not what was sent, and FileNotFoundError where the
    file is not, or another: on another host than the sender's, mapping it would create it,
    full of zeros, without a word.
    """
    path, inode = Path(file["path"]), file["inode"]
    there = path.stat() if path.exists() else None
    if there is None or there.st_size != file["nbytes"] or inode not in (None, there.st_ino):
        raise FileNotFoundError(
            f"weights {path} ({file['nbytes']} bytes) are not on this host; with "
            "resources.transport=shared_memory engines and learner must share one: set "
            "resources.transport=disk and keep `runs` on a file system that all hosts see"
        )
    if inode is None:
        storage = map_file(file["path"], file["nbytes"])
    else:
        storage = _mapped(file["path"], inode, file["nbytes"])
    tensors = list(views(storage, Layout(**layout)))
    check(tensors, layout["checksums"])
    return storage, tensors


def views(storage: torch.UntypedStorage, layout: Layout) -> Iterator[Named]:
    """The tensors of a layout, sharing memory with ``storage``."""
    memory: Tensor = torch.empty(0, dtype=torch.uint8)
    memory.set_(storage)  # type: ignore[call-overload]
    columns = (layout.names, layout.dtypes, layout.shapes, layout.offsets)
    for name, dtype_name, shape, offset in zip(*columns, strict=True):
        dtype = getattr(torch, dtype_name)
        own = memory.narrow(0, offset, math.prod(shape) * dtype.itemsize)
        yield name, own.view(dtype).view(shape)


@lru_cache(maxsize=2)  # as many as a sender has: mapping anew costs more than copying
def _mapped(path: str, inode: int, nbytes: int) -> torch.UntypedStorage:
    return map_file(path, nbytes)


def map_file(path: str, nbytes: int) -> torch.UntypedStorage:
    storage: Any = torch.UntypedStorage.from_file(path, shared=True, nbytes=nbytes)
    return storage
