"""The trainer: DeepSpeed ZeRO-3 ranks, batching, packing, and publishing weights.

The names below are for reinforcement learning without nights, with ``sleeprl.rollout``. They are
imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sleeprl.losses.types import LossOptions, LossWeights
    from sleeprl.trainer.batching import TrainingExample
    from sleeprl.trainer.options import TrainerOptions
    from sleeprl.trainer.publish import publish_weights
    from sleeprl.trainer.single_rank import single_rank_group
    from sleeprl.trainer.trainer import Trainer

_HOMES = {
    "LossOptions": "sleeprl.losses.types",
    "LossWeights": "sleeprl.losses.types",
    "Trainer": "sleeprl.trainer.trainer",
    "TrainerOptions": "sleeprl.trainer.options",
    "TrainingExample": "sleeprl.trainer.batching",
    "publish_weights": "sleeprl.trainer.publish",
    "single_rank_group": "sleeprl.trainer.single_rank",
}
"""Where each public name is defined."""

__all__ = [
    "LossOptions",
    "LossWeights",
    "Trainer",
    "TrainerOptions",
    "TrainingExample",
    "publish_weights",
    "single_rank_group",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
