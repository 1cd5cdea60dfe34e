"""sleepRL: a language model that sleeps (arXiv 2606.03979).

The names below are the public API. They are imported when they are first used, so that
``import sleeprl`` brings neither torch nor ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sleeprl._version import __version__
from sleeprl.utils.lazy_names import lazy_names

if TYPE_CHECKING:
    from sleeprl.algorithms.base import Algorithm
    from sleeprl.api import (
        Figures,
        Generation,
        NightPlan,
        NightResult,
        load_config,
        plan_night,
        replay_dreaming,
        resume_night,
        run_night,
    )
    from sleeprl.config.schema import ConfigError, NightConfig
    from sleeprl.consolidation.judges import Judge
    from sleeprl.data.experience import Experience
    from sleeprl.data.lake import Lake
    from sleeprl.data.trajectory import Trajectory
    from sleeprl.dreaming.formats import DreamFormat
    from sleeprl.dreaming.types import Curriculum, Dream, Outcome, Reward, Task
    from sleeprl.lineage.store import LineageStore
    from sleeprl.memory.growth import Growth
    from sleeprl.plugins import PluginError, register
    from sleeprl.reporting.sinks.base import MetricsSink
    from sleeprl.rollout.engine import RolloutEngine
    from sleeprl.weight_sync.base import WeightTransport

_HOMES = {
    "Algorithm": "sleeprl.algorithms.base",
    "ConfigError": "sleeprl.config.schema",
    "Curriculum": "sleeprl.dreaming.types",
    "Dream": "sleeprl.dreaming.types",
    "DreamFormat": "sleeprl.dreaming.formats",
    "Experience": "sleeprl.data.experience",
    "Figures": "sleeprl.api",
    "Generation": "sleeprl.api",
    "Growth": "sleeprl.memory.growth",
    "Judge": "sleeprl.consolidation.judges",
    "Lake": "sleeprl.data.lake",
    "LineageStore": "sleeprl.lineage.store",
    "MetricsSink": "sleeprl.reporting.sinks.base",
    "NightConfig": "sleeprl.config.schema",
    "NightPlan": "sleeprl.api",
    "NightResult": "sleeprl.api",
    "Outcome": "sleeprl.dreaming.types",
    "PluginError": "sleeprl.plugins",
    "Reward": "sleeprl.dreaming.types",
    "RolloutEngine": "sleeprl.rollout.engine",
    "Task": "sleeprl.dreaming.types",
    "Trajectory": "sleeprl.data.trajectory",
    "WeightTransport": "sleeprl.weight_sync.base",
    "load_config": "sleeprl.api",
    "plan_night": "sleeprl.api",
    "register": "sleeprl.plugins",
    "replay_dreaming": "sleeprl.api",
    "resume_night": "sleeprl.api",
    "run_night": "sleeprl.api",
}
"""Where each public name is defined."""

__all__ = [
    "Algorithm",
    "ConfigError",
    "Curriculum",
    "Dream",
    "DreamFormat",
    "Experience",
    "Figures",
    "Generation",
    "Growth",
    "Judge",
    "Lake",
    "LineageStore",
    "MetricsSink",
    "NightConfig",
    "NightPlan",
    "NightResult",
    "Outcome",
    "PluginError",
    "Reward",
    "RolloutEngine",
    "Task",
    "Trajectory",
    "WeightTransport",
    "__version__",
    "load_config",
    "plan_night",
    "register",
    "replay_dreaming",
    "resume_night",
    "run_night",
]


__getattr__ = lazy_names(__name__, _HOMES)


def __dir__() -> list[str]:
    """List the public names, also those that are not imported yet."""
    return sorted({*globals(), *__all__})
