"""What vLLM is started with, by device: environment variables and engine arguments."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from sleeprl.rollout.engine import EngineOptions
from sleeprl.utils.leftovers import own_scratch
from sleeprl.weight_sync.vllm_plugin import BACKEND

WORKER_EXTENSION = "sleeprl.weight_sync.vllm_receiver.FaultReport"
UNIPROC = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


def set_environment(options: EngineOptions, of_transport: Mapping[str, str]) -> None:
    """Set the variables that vLLM reads when it is imported and started.

    Args:
        options: What the engine is to be.
        of_transport: Variables that its transport needs.
    """
    os.environ.update(of_transport)
    if options.gpu:
        # Nothing is sampled by top-p or top-k here, whose kernels would be compiled at the start.
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    else:
        ranks = options.tensor_parallel
        os.environ["OMP_NUM_THREADS"] = str(max(1, options.threads // ranks))
        # vLLM's figure is that of one rank.
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(options.memory_gb / ranks)))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        # Eager anyway; without this the first batch waits 16 s for stray compilations.
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
    # vLLM leaves its sockets behind: in a folder of their own the next start finds and clears them.
    if "VLLM_RPC_BASE_PATH" not in os.environ:
        os.environ["VLLM_RPC_BASE_PATH"] = str(own_scratch())
    # A partial update warns once per module that was not sent; the canary is what checks it.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def engine_args(options: EngineOptions, backend: str) -> Any:
    """Build vLLM's ``AsyncEngineArgs``; imports vLLM.

    Args:
        options: What the engine is to be.
        backend: Name of the weight receiver with vLLM's factory.
    """
    from vllm import AsyncEngineArgs
    from vllm.config import WeightTransferConfig

    return AsyncEngineArgs(
        model=options.model,
        tensor_parallel_size=options.tensor_parallel,
        dtype=options.dtype,
        max_model_len=options.max_length,
        enforce_eager=not options.gpu,
        seed=options.seed,
        enable_prefix_caching=True,
        max_num_seqs=128,
        logprobs_mode="processed_logprobs",
        weight_transfer_config=WeightTransferConfig(backend=backend),
        worker_extension_cls=WORKER_EXTENSION if backend == BACKEND else "",
        disable_log_stats=True,
        **(_gpu_args(options) if options.gpu else _cpu_args(options)),
        **_executor_args(options),
    )


def _gpu_args(options: EngineOptions) -> dict[str, Any]:
    return {
        "gpu_memory_utilization": options.gpu_utilization,
        "enable_sleep_mode": options.colocated,
    }


def _cpu_args(options: EngineOptions) -> dict[str, Any]:
    # vLLM 0.32 rewinds the generator of a seeded request whose prefill is cut in two, which a
    # CPU generator cannot do: the engine dies. So no prompt is ever cut.
    return {
        "enable_chunked_prefill": False,
        # The smallest its attention takes, of 128 by default: what the prompts of a group have
        # in common is read once, by whole blocks.
        "block_size": 32,
        "max_num_batched_tokens": max(8192, options.max_length),
    }


def _executor_args(options: EngineOptions) -> dict[str, Any]:
    if options.tensor_parallel > 1:
        return {"distributed_executor_backend": "mp"}  # within this actor's resources
    if options.gpu:
        return {}
    # The worker in the engine's own process: a process less to start, and none that spins while
    # the other works. OMP's threads are set for all of them by ``set_environment``.
    return {"distributed_executor_backend": UNIPROC}
