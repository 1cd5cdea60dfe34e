"""The one data type, its Arrow schema, token-budget packing and the experience lake."""

from sleeprl.data.experience import Experience
from sleeprl.data.lake import Lake
from sleeprl.data.trajectory import Trajectory, from_batch, to_batch

__all__ = ["Experience", "Lake", "Trajectory", "from_batch", "to_batch"]
