"""Teaches vLLM our transport. Loaded by vLLM itself, in each of its processes, through the
entry point ``vllm.general_plugins``; nothing of vLLM is patched."""

from __future__ import annotations

BACKEND = "sleeprl_shared_memory"


def register() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "sleeprl.weights.vllm_receiver", "SharedMemoryWeightTransferEngine"
        )
