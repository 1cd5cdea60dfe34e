"""DeepSpeed's configuration of the learner: ZeRO-3, for GPUs and for CPUs."""

from __future__ import annotations

from typing import Any

from torch import nn

_IN_CACHE: dict[str, Any] = {
    "sub_group_size": 2**20,
    "reduce_bucket_size": 2**20,
    "contiguous_gradients": False,
    "memory_efficient_linear": False,
}
"""ZeRO-3 on CPUs: gradients are reduced and parameters updated piece by piece (elements), while
they are in the cache. DeepSpeed's own sizes are a GPU's, and with them each operation goes
through all of the memory (benchmarks/learner.py has the speed against a bare loop)."""


def deepspeed_config(*, dtype: str, grad_clip: float, gpu: bool, offload: str) -> dict[str, Any]:
    """offload: see ``resources.offload``. Without a GPU nothing moves by it, and the same is learned."""
    zero: dict[str, Any] = {"stage": 3, **({} if gpu else _IN_CACHE)}
    # Pinned: only from there does a GPU copy while it computes.
    host = {"device": "cpu", "pin_memory": gpu}
    if offload != "none":
        zero["offload_optimizer"] = host
    if offload == "parameters":
        zero["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW also where it is offloaded
        "bf16": {"enabled": dtype == "bfloat16"},
        # Else micro-batches are summed in the model's own, and what comes of them depends on their size.
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def gather_by_layer(model: Any) -> None:
    """Let ZeRO-3 gather a decoder layer as one, not each of its modules: what its hooks do for each
    is a good part of a small model's step.

    A layer that learns and whose input needs no gradient is left alone: DeepSpeed would take its
    gradients as complete, and its weights away, before there are any (0.19).
    """
    from deepspeed.utils import set_z3_leaf_module

    decoder = model.get_submodule("model")
    reached = _learns(decoder.get_submodule("embed_tokens"))
    for layer in decoder.get_submodule("layers"):
        learns = _learns(layer)
        set_z3_leaf_module(layer, reached or not learns)
        reached = reached or learns


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
