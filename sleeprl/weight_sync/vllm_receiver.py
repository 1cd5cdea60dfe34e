"""The engine's side of a transport by buckets, as a weight-transfer engine of vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)

from sleeprl.weight_sync.buckets import receive


@dataclass
class BucketInitInfo(WeightTransferInitInfo):
    """Nothing to agree on: each bucket describes itself."""


@dataclass
class BucketUpdateInfo(WeightTransferUpdateInfo):
    file: dict[str, Any]
    layout: str
    checksums: dict[str, int]


class BucketWeightTransferEngine(WeightTransferEngine[BucketInitInfo, BucketUpdateInfo]):
    """Loads tensors from mapped buckets.

    Each rank of a tensor-parallel engine maps them, and vLLM keeps its shard of each tensor.
    Through vLLM's layer-wise reload, because kernels re-lay-out weights after
    loading (on the CPU the live parameter is empty): writing into live parameters
    would be silently lost.
    """

    fault: str | None = None
    """What went wrong in the update that is under way. Kept, not raised: of several ranks that
    raise, vLLM reads the answer of the first, and takes the others' for those to its next call."""

    init_info_cls = BucketInitInfo
    update_info_cls = BucketUpdateInfo

    def init_transfer_engine(self, init_info: BucketInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        self.fault = None
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: BucketUpdateInfo) -> None:
        if self.fault is not None:
            return
        try:
            storage, tensors = receive(**vars(update_info))
            self.model.load_weights(tensors)
            self._own(storage.data_ptr())
        except Exception as error:
            self.fault = f"{type(error).__name__}: {error}"

    def _own(self, mapped: int) -> None:
        """Copy what vLLM holds back until a layer is whole: the sender writes that memory again."""
        for layer in self.model.modules():
            for _, call in get_layerwise_info(layer).loaded_weights:
                for name, value in call.arguments.items():
                    if isinstance(value, Tensor) and value.untyped_storage().data_ptr() == mapped:
                        call.arguments[name] = value.clone()

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


class Reports:
    """What vLLM's workers can be asked beside their own methods (``worker_extension_cls``)."""

    weight_transfer_engine: BucketWeightTransferEngine

    def weight_fault(self) -> str | None:
        """Why this rank could not load all that it was sent in the last update."""
        return self.weight_transfer_engine.fault
