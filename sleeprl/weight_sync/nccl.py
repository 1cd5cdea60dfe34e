"""Weights by NCCL broadcast into vLLM's own receiver.

This is the sender's side, on vLLM's own functions. **The tests have no GPU and do not run it**:
they check that the calls fit vLLM's interface. vLLM's receiver takes no checksums, so the canary
alone verifies these updates. Each rank of a tensor-parallel engine has a GPU of its own and gets
all of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch

from sleeprl.weight_sync import gpu_common
from sleeprl.weight_sync.base import (
    NamedTensor,
    TransportConfig,
    TransportError,
    WeightTransport,
    split_tensors,
)
from sleeprl.weight_sync.gpu_common import BUCKET_BYTES, describe_tensors, run_with_timeout


class NcclTransport(WeightTransport):
    """Broadcasts as rank 0 of a group of its own.

    After a timeout the group is gone, and only ``connect`` makes another.
    """

    needs_gpu: ClassVar[bool] = True
    shares_gpu: ClassVar[bool] = False
    vllm_backend: ClassVar[str | None] = "nccl"

    def __init__(self, config: TransportConfig, limit: int = BUCKET_BYTES) -> None:
        gpu_common.require_gpu("nccl")
        self.ranks, self.limit = config.ranks, limit
        self._group: Any = None

    def connect(self, engines: int) -> Iterator[list[dict[str, Any]]]:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init
        from vllm.utils.network_utils import get_ip, get_open_port

        address, port = get_ip(), get_open_port()
        yield connect_infos(address, port, engines, self.ranks)
        world = 1 + engines * self.ranks
        where = {"master_address": address, "master_port": port, "world_size": world}
        self._group = run_with_timeout(
            gpu_common.COLLECTIVE_TIMEOUT_S, "the engines to join", lambda: trainer_init(where)
        )

    def begin(self, version: int) -> None:
        if self._group is None:
            raise TransportError(
                "the group that weights are broadcast in was aborted after a timeout; "
                "EnginePool.disconnect() lets the next update connect again, once the dead are "
                "replaced"
            )

    def buckets(self, tensors: Iterable[NamedTensor]) -> Iterator[dict[str, Any]]:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        for group in split_tensors(tensors, self.limit):
            on_gpu = [(name, tensor.cuda()) for name, tensor in group]
            yield describe_tensors(on_gpu)  # the engines now wait for what follows
            send = lambda on_gpu=on_gpu: packed_nccl_broadcast_producer(  # noqa: E731
                iter(on_gpu), self._group, src=0, post_iter_func=lambda named: named[1]
            )
            run_with_timeout(
                gpu_common.COLLECTIVE_TIMEOUT_S, "a broadcast of weights", send, self.close
            )
            torch.cuda.synchronize()

    def close(self) -> None:
        """Abort what is under way in the group; vLLM waits 5 s for that."""
        group, self._group = self._group, None
        if group is not None:
            group.destroy()


def connect_infos(address: str, port: int, engines: int, ranks: int = 1) -> list[dict[str, Any]]:
    """Return what each engine joins the sender's NCCL group with.

    An engine's first rank is 1 + i * ranks; vLLM adds the number of a rank within the engine.
    """
    from vllm.distributed.weight_transfer.nccl_common import (
        NCCLWeightTransferInitInfo,
        worker_init_payload,
    )

    return [
        worker_init_payload(
            NCCLWeightTransferInitInfo(
                master_address=address,
                master_port=port,
                rank_offset=1 + number * ranks,
                world_size=1 + engines * ranks,
                packed=True,
            )
        )
        for number in range(engines)
    ]
