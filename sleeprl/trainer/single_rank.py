"""Let one process be a whole training group, for a loop without Ray Train or actors."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def single_rank_group(*, gpu: bool = False) -> Iterator[None]:
    """Make this process the only rank of ``torch.distributed`` for the time being.

    A ``Trainer`` can be created in it. Starts no server and opens no port.
    """
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    with tempfile.TemporaryDirectory() as directory:
        store, backend = f"file://{directory}/store", "nccl" if gpu else "gloo"
        dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
