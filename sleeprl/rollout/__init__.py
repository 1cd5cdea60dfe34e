"""Rollout engines: generate with the weights that a trainer publishes, with proof that they arrived.

This level of the API works without a night:

    import ray
    from sleeprl.rollout import EngineOptions, EnginePool, SamplingParams

    ray.init()
    options = EngineOptions(
        model="path/to/checkpoint", dtype="float32", max_length=512, threads=1, memory_gb=1.0,
        gpu=False, gpu_utilization=0.4, seed=0,
    )
    pool = EnginePool.launch(1, options, cpus=1, gpus=0, engine="torch")
    (completion,) = pool.generate([[1, 5, 7]], [SamplingParams(max_tokens=16, seed=0)])
    pool.publish(model.state_dict().items())
    pool.shutdown()

The names below are imported when they are first used, so that ``import sleeprl.rollout`` brings
neither torch nor ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sleeprl.utils.lazy_names import lazy_names

if TYPE_CHECKING:
    from sleeprl.rollout.engine import EngineOptions, RolloutEngine
    from sleeprl.rollout.engine_pool import EnginePool
    from sleeprl.rollout.types import Completion, SamplingParams

__all__ = ["Completion", "EngineOptions", "EnginePool", "RolloutEngine", "SamplingParams"]

_HOMES = {
    "Completion": "sleeprl.rollout.types",
    "EngineOptions": "sleeprl.rollout.engine",
    "EnginePool": "sleeprl.rollout.engine_pool",
    "RolloutEngine": "sleeprl.rollout.engine",
    "SamplingParams": "sleeprl.rollout.types",
}
"""Where each public name is defined."""

__getattr__ = lazy_names(__name__, _HOMES)
