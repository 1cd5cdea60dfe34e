"""The trainer: DeepSpeed ZeRO-3 ranks, batching, packing, and publishing weights.

The names below are for reinforcement learning without nights, with ``sleeprl.rollout``. They are
imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sleeprl.utils.lazy_names import lazy_names

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

__getattr__ = lazy_names(__name__, _HOMES)
