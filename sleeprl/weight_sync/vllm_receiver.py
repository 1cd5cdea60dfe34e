"""The engine's side of every transport with a ``receive``, as a weight-transfer engine of vLLM."""

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

from sleeprl.weight_sync.base import NamedTensor
from sleeprl.weight_sync.factory import transport_class


@dataclass
class ReceiverInitInfo(WeightTransferInitInfo):
    """Nothing to agree on: each bucket describes itself."""


@dataclass
class ReceiverUpdateInfo(WeightTransferUpdateInfo):
    """One bucket."""

    transport: str
    """A plug-in of kind ``transport``."""
    bucket: dict[str, Any]
    """What its ``receive`` needs."""


class TransportReceiver(WeightTransferEngine[ReceiverInitInfo, ReceiverUpdateInfo]):
    """Loads the tensors that a transport receives.

    Each rank of a tensor-parallel engine receives them whole, and vLLM keeps its shard of each.
    They go through vLLM's layer-wise reload, because kernels re-lay-out weights after loading (on
    the CPU the live parameter is empty): writing into live parameters would be silently lost.
    """

    fault: str | None = None
    """What went wrong in the update that is under way. Kept, not raised: of several ranks that
    raise, vLLM reads the answer of the first, and takes the others' for those to its next call."""

    init_info_cls = ReceiverInitInfo
    update_info_cls = ReceiverUpdateInfo

    def init_transfer_engine(self, init_info: ReceiverInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        self.fault = None
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ReceiverUpdateInfo) -> None:
        if self.fault is not None:
            return
        try:
            receive = transport_class(update_info.transport).receive
            tensors = list(receive(update_info.bucket))
            self.model.load_weights(tensors)
            self._copy_held_back(tensors)
        except Exception as error:
            self.fault = f"{type(error).__name__}: {error}"

    def _copy_held_back(self, tensors: list[NamedTensor]) -> None:
        """Copy what vLLM holds back until a layer is whole: the sender writes that memory again."""
        received = {tensor.untyped_storage().data_ptr() for _, tensor in tensors}
        for layer in self.model.modules():
            for _, call in get_layerwise_info(layer).loaded_weights:
                for name, value in call.arguments.items():
                    if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in received:
                        call.arguments[name] = value.clone()

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


class FaultReport:
    """What vLLM's workers can be asked beside their own methods (``worker_extension_cls``)."""

    weight_transfer_engine: TransportReceiver

    def weight_fault(self) -> str | None:
        """Return why this rank could not load all that it was sent in the last update."""
        return self.weight_transfer_engine.fault
