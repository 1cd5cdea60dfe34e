"""The one data type, its Arrow schema, token-budget packing and the experience lake."""

from sleeprl.trajectories.experience import Experience
from sleeprl.trajectories.lake import Lake
from sleeprl.trajectories.schema import Trajectory, from_batch, to_batch

__all__ = ["Experience", "Lake", "Trajectory", "from_batch", "to_batch"]
