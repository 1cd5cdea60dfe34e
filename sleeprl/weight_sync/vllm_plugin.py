"""Registers our receiver with vLLM.

vLLM calls ``register`` itself, in each of its processes, through the entry point
``vllm.general_plugins``; nothing of vLLM is patched.
"""

from __future__ import annotations

BACKEND = "sleeprl"
"""Under this name vLLM knows the receiver."""


def register() -> None:
    """Add the receiver to vLLM's factory, once."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "sleeprl.weight_sync.vllm_receiver", "TransportReceiver"
        )
