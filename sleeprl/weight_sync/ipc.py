"""Weights by CUDA IPC into vLLM's own receiver, where trainer and engine share one GPU.

This is the sender's side. **The tests have no GPU and do not run it**: they check that the
messages fit vLLM's interface. vLLM's receiver takes no checksums, so the canary alone verifies
these updates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch

from sleeprl.weight_sync.base import (
    NamedTensor,
    TransportConfig,
    WeightTransport,
    split_tensors,
)
from sleeprl.weight_sync.gpu_common import BUCKET_BYTES, describe_tensors, require_gpu


class IpcTransport(WeightTransport):
    """Sends handles to the sender's own GPU memory."""

    same_host: ClassVar[bool] = True
    needs_gpu: ClassVar[bool] = True
    spans_gpus: ClassVar[bool] = False
    vllm_backend: ClassVar[str | None] = "ipc"
    # Handles are no plain data; they come from this host's own trainer.
    vllm_environment: ClassVar[Mapping[str, str]] = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}

    def __init__(self, config: TransportConfig, limit: int = BUCKET_BYTES) -> None:
        require_gpu("ipc")
        self.limit = limit
        self._sent: list[list[NamedTensor]] = []
        """The last two buckets: a handle keeps nothing alive."""

    def connect(self, engines: int) -> Iterator[list[dict[str, Any]]]:
        yield [{"packed": False}] * engines

    def buckets(self, tensors: Iterable[NamedTensor]) -> Iterator[dict[str, Any]]:
        from torch.multiprocessing.reductions import reduce_tensor

        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        for group in split_tensors(tensors, self.limit):
            on_gpu = [(name, tensor.cuda().contiguous()) for name, tensor in group]
            self._sent = [*self._sent[-1:], on_gpu]
            handles = [{uuid: reduce_tensor(tensor)[1]} for _, tensor in on_gpu]
            torch.cuda.synchronize()
            yield {**describe_tensors(on_gpu), "ipc_handles": handles}

    def finish(self) -> None:
        self._sent = []
        torch.cuda.ipc_collect()

    def close(self) -> None:
        self._sent = []
