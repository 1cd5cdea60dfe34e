"""Notices a reward that fails on every dream: nothing is learned from it, and nothing else breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sleeprl.config.schema import ConfigError, DreamingConfig

LIMIT = 3
"""Updates in a row without a reward, after which dreaming stops."""


@dataclass
class RewardWatch:
    """Warns of an update without a reward, and stops dreaming after ``LIMIT`` of them in a row."""

    in_a_row: int = 0
    any_scored: bool = False
    """Whether an update since the start, or the resume, had a reward."""

    def check(
        self, config: DreamingConfig, version: int, failure: str, warn: Callable[[str], None]
    ) -> None:
        """Look at an update.

        Args:
            config: The settings of dreaming.
            version: Number of the update, from 1. A resumed night has not counted those before, and
                stops at the last one where none since had a reward.
            failure: Why its first dream has no reward, if none of its dreams has one; else empty.
            warn: Receives a message for each such update.

        Raises:
            ConfigError: It is the last of too many.
        """
        self.in_a_row = self.in_a_row + 1 if failure else 0
        self.any_scored |= not failure
        if not failure:
            return
        problem = f"none of the dreams of this update could be scored: {failure}"
        limit = min(LIMIT, config.steps)
        if self.in_a_row >= limit or (version >= config.steps and not self.any_scored):
            raise ConfigError(
                f"dreaming.reward={config.reward!r}: {problem}. It was so for {self.in_a_row} "
                "update(s) in a row, and nothing is learned like this; correct the reward and resume, "
                "or go on without dreams: dreaming.enabled: false in the run's config.yaml"
            )
        warn(f"{problem}; dreaming stops after {limit} such updates in a row")
