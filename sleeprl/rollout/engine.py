"""The contract of a rollout engine, its options, and how its actor is started."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sleeprl.config.schema import ConfigError, NightConfig
from sleeprl.plugins import resolve
from sleeprl.rollout.types import Completion, SamplingParams
from sleeprl.weight_sync.base import TransportConfig
from sleeprl.weight_sync.verification import Canary, UpdateReceipt


class RolloutEngine(Protocol):
    """Token ids in, token ids out.

    Guarantees:

    * ``begin_update``, ``load_bucket``, ``finish_update`` lose no token of a running request, and
      the versions of a completion cover each of its tokens exactly once.
    * Whatever goes wrong in an update, it ends in a receipt.
    * An engine whose update did not end verified raises StaleWeights for all work, running work
      included, until a later update verifies. Only groups that were being generated are handed
      back, as far as their tokens are right.
    * A sleeping engine generates no token and scores nothing; requests wait. ``wake_up``, or the
      beginning of an update, lets it go on with the tokens it would have sampled anyway. Both
      may be called again.
    """

    async def transport_config(self) -> TransportConfig: ...

    async def connect(self, info: dict[str, Any]) -> None: ...

    async def generate(
        self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]
    ) -> list[Completion]: ...

    async def logprobs(
        self, sequences: Sequence[list[int]], starts: Sequence[int] | None = None
    ) -> list[list[float]]: ...

    async def begin_update(self, version: int) -> None: ...

    async def load_bucket(self, update_info: dict[str, Any]) -> None: ...

    async def finish_update(self, canary: Canary | None) -> UpdateReceipt: ...

    async def version(self) -> int: ...

    async def sleep(self) -> None: ...

    async def wake_up(self) -> None: ...


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is started with."""

    model: str
    """Directory of a checkpoint."""
    dtype: str
    """Torch's name of the type that it computes in, such as ``float32``."""
    max_length: int
    """The most tokens of a prompt and its response."""
    threads: int = 1
    """CPU threads of all its processes together; without effect on a GPU."""
    memory_gb: float = 1.0
    """Memory of the KV cache of all its processes together, in GB; without effect on a GPU."""
    gpu: bool = False
    """Whether it runs on a GPU."""
    gpu_utilization: float = 0.4
    """The share of the GPU's memory that vLLM may take."""
    seed: int = 0
    """Of requests without a seed of their own."""
    transport: TransportConfig = TransportConfig()
    colocated: bool = False
    """A trainer works on the same device while the engine sleeps."""
    tensor_parallel: int = 1
    """Processes that share every layer of the model."""

    @classmethod
    def from_config(cls, config: NightConfig, model: str, dtype: str) -> EngineOptions:
        """Take what a night's settings say of an engine that holds a checkpoint.

        Raises:
            ConfigError: the checkpoint cannot be split over ``resources.engine_tensor_parallel``
                processes.
        """
        resources, ranks = config.resources, config.resources.engine_tensor_parallel
        require_shards(Path(model), ranks)
        return cls(
            model=model,
            dtype=dtype,
            max_length=config.model.max_length,
            threads=resources.engine_cpus,
            memory_gb=resources.engine_kv_cache_gb,
            gpu=resources.engine_gpus > 0,
            gpu_utilization=resources.engine_gpu_memory_utilization,
            seed=config.seed,
            transport=TransportConfig(
                resources.transport,
                resources.update_mode,
                str((config.run_dir / "weights").resolve()),
                ranks,
            ),
            colocated=resources.layout == "colocated",
            tensor_parallel=ranks,
        )


def require_shards(checkpoint: Path, ranks: int) -> None:
    """Check that processes can share every layer of a checkpoint.

    Args:
        checkpoint: Directory with a ``config.json``.
        ranks: Number of processes.

    Raises:
        ConfigError: its heads or the width of its MLPs cannot be divided by ``ranks``.
    """
    if ranks == 1:
        return
    model = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    heads = model["num_attention_heads"]
    kv_heads = model.get("num_key_value_heads") or heads
    for name, count in (
        ("num_attention_heads", heads),
        # Fewer heads than processes are copied to several.
        ("num_key_value_heads", max(kv_heads, ranks) if ranks % kv_heads == 0 else kv_heads),
        ("intermediate_size", model["intermediate_size"]),
    ):
        if count % ranks:
            raise ConfigError(
                f"resources.engine_tensor_parallel={ranks} cannot share {name}={count} of "
                f"{checkpoint}; set it to a divisor, such as 1"
            )


def spawn_engine(
    index: int,
    options: EngineOptions,
    cpus: float,
    gpus: float,
    engine: str,
    placement: Any = None,
) -> Any:
    """Start the actor of one engine, which can generate when its ``start`` has returned.

    Args:
        index: Its number, which names it.
        options: What it is started with.
        cpus: Cores that it reserves.
        gpus: GPUs that it reserves.
        engine: A plug-in of kind ``engine``.
        placement: A placement group, in whose bundle of this index it goes. An engine beyond the
            group's bundles goes where there is room.

    Returns:
        The actor's handle.
    """
    actor_class: Any = resolve(engine, "engine")
    strategy: Any = None
    if placement is not None and index < placement.bundle_count:
        strategy = PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=index)
    actor = ray.remote(actor_class).options(
        num_cpus=cpus, num_gpus=gpus, max_concurrency=256, scheduling_strategy=strategy
    )
    return actor.remote(name=f"engine-{index}", options=options)
