"""Weights through shared memory on one host: written once, loaded in place, never pickled.

The sender packs tensors into a file below ``/dev/shm`` and passes only its path
and layout; the engine maps that file and loads straight from it. Imports no ray.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64
BUCKET_BYTES = 256 << 20


@dataclass(frozen=True)
class Bucket:
    """Some whole tensors packed into one file; plain data, so it can cross any RPC."""

    path: str
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    nbytes: int


def directory() -> Path:
    """Memory-backed where the system has it, the temporary directory elsewhere."""
    shm = Path("/dev/shm")
    return shm if os.access(shm, os.W_OK) else Path(tempfile.gettempdir())


def pack(tensors: Iterable[tuple[str, Tensor]], limit: int = BUCKET_BYTES) -> Iterator[Bucket]:
    """Pack a stream of tensors into buckets of at most ``limit`` bytes (one tensor at least).

    A generator: at most one bucket's tensors are held at a time. Tensors are
    copied, so views into a gather that closes later are safe to pass.
    """
    pending: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        nbytes = _aligned(tensor.numel() * tensor.element_size())
        if pending and size + nbytes > limit:
            yield _write(pending, size)
            pending, size = [], 0
        pending.append((name, tensor))
        size += nbytes
    if pending:
        yield _write(pending, size)


def unpack(bucket: Bucket) -> list[tuple[str, Tensor]]:
    """Tensors that share memory with the bucket's file.

    Raises FileNotFoundError where the file is not, or not whole: on another host than the
    sender's, mapping it would create it, full of zeros, without a word.
    """
    path = Path(bucket.path)
    if not path.is_file() or path.stat().st_size != bucket.nbytes:
        raise FileNotFoundError(
            f"weights {bucket.path} ({bucket.nbytes} bytes) are not on this host; engines and "
            "learner must share one (transport: shared memory)"
        )
    storage = torch.UntypedStorage.from_file(bucket.path, shared=True, nbytes=bucket.nbytes)
    tensors = []
    for name, dtype_name, shape, offset in zip(
        bucket.names, bucket.dtypes, bucket.shapes, bucket.offsets, strict=True
    ):
        dtype = getattr(torch, dtype_name)
        count = math.prod(shape)
        flat = torch.empty(0, dtype=dtype)
        flat.set_(storage, offset // dtype.itemsize, (count,))  # type: ignore[call-overload]
        tensors.append((name, flat.view(shape)))
    return tensors


def discard(bucket: Bucket) -> None:
    """Remove the bucket's file; mappings that still exist stay valid until they close."""
    Path(bucket.path).unlink(missing_ok=True)


def as_update_info(bucket: Bucket) -> dict[str, Any]:
    return {"bucket": vars(bucket)}


def _write(tensors: list[tuple[str, Tensor]], size: int) -> Bucket:
    handle, path = tempfile.mkstemp(prefix="sleeprl-weights-", dir=directory())
    try:
        # Reserved now: a full memory file system must say so here, not end the process later.
        os.posix_fallocate(handle, 0, size)
    except OSError:
        Path(path).unlink()
        raise
    finally:
        os.close(handle)
    bucket = Bucket(path, [], [], [], [], size)
    offset = 0
    for name, tensor in tensors:
        bucket.names.append(name)
        bucket.dtypes.append(str(tensor.dtype).removeprefix("torch."))
        bucket.shapes.append(list(tensor.shape))
        bucket.offsets.append(offset)
        offset += _aligned(tensor.numel() * tensor.element_size())
    for (_, source), (_, target) in zip(tensors, unpack(bucket), strict=True):
        target.copy_(source)
    return bucket


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
