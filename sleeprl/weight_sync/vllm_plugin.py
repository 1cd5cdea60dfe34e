"""Teaches vLLM our receiver. Loaded by vLLM itself, in each of its processes, through the
entry point ``vllm.general_plugins``; nothing of vLLM is patched."""

from __future__ import annotations


def register() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from sleeprl.weight_sync.buckets import BACKEND

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "sleeprl.weight_sync.vllm_receiver", "BucketWeightTransferEngine"
        )
