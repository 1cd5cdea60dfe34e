"""The trainer: DeepSpeed ZeRO-3 ranks, batching, packing, and publishing weights."""
