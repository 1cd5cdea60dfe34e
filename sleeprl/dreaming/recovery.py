"""Restarts dead actors of dreaming: engines one by one, trainer ranks all together.

A live engine that is not verified after an update gets the weights again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sleeprl.cluster.actor_group import ActorGroup
from sleeprl.cluster.failures import ActorFailure, FailureKind
from sleeprl.cluster.health import HealthState
from sleeprl.dreaming.checkpoint import DreamingCheckpoint


@dataclass
class RecoveryManager:
    """Classifies failures, and restarts dead actors.

    Only retryable failures are recovered from. A restarted engine gets no work until an update
    verifies it.
    """

    engines: ActorGroup
    learner: ActorGroup
    new_engine: Callable[[int], Any]
    """Starts the engine of an index, without waiting for it."""
    new_learner: Callable[[int], Any]
    """Starts the trainer actor of a rank, without waiting for it."""
    limit: int
    """Largest number of recoveries."""
    on_restart: Callable[[str], None]
    """Receives a message for each restart: what, and why."""
    num_recoveries: int = 0
    """Recoveries so far; actors that die together count once."""
    dead: dict[str, list[int]] = field(default_factory=dict)
    """Indices of the dead actors of each group, from ``classify`` to ``recover``."""

    def classify(self, failure: ActorFailure) -> bool:
        """Determine what a failure affects.

        Returns:
            Whether an engine or a trainer rank is dead, or an engine stale.

        Raises:
            ActorFailure: The failure is not retryable, or the limit is reached.
        """
        if failure.failure.kind is FailureKind.FATAL:
            raise failure
        self.dead = {group.name: group.probe_dead() for group in (self.engines, self.learner)}
        stale = [f"engine-{index}" for index in self.engines.health.having(HealthState.STALE)]
        died = [f"{name}-{index}" for name, found in self.dead.items() for index in found]
        if not (died or stale):
            return False
        if self.num_recoveries >= self.limit:
            raise failure
        self.num_recoveries += 1
        what = "died and will be restarted" if died else "is stale and gets the weights again"
        self.on_restart(
            f"{' and '.join(died or stale)} {what} "
            f"({self.num_recoveries} of resources.max_failures={self.limit}): "
            f"{failure.failure.message}"
        )
        return True

    def recover(self, checkpoint: DreamingCheckpoint) -> bool:
        """Restart the dead actors that ``classify`` found.

        Args:
            checkpoint: The checkpoint that restarted trainer ranks continue from.

        Returns:
            Whether the trainer went back to the checkpoint.
        """
        dead, self.dead = self.dead, {}
        engines, ranks = (dead.get(group.name, []) for group in (self.engines, self.learner))
        for index in engines:
            self.engines.replace(index, self.new_engine(index))
        if engines:
            self.engines.start(engines)
        if ranks:  # the other ranks hang in a collective with the dead one
            everyone = self.learner.present
            for index in everyone:
                self.learner.replace(index, self.new_learner(index))
            start_ranks(self.learner, checkpoint)
            self.learner.started(everyone)
            self.learner.updated(everyone)  # to the checkpoint's version
        return bool(ranks)


def start_ranks(learner: ActorGroup, checkpoint: DreamingCheckpoint) -> None:
    """Connect new trainer ranks, and restore a checkpoint on them."""
    address = learner.call("rendezvous")[0]
    state = str(checkpoint.version_dir) if checkpoint.version else None
    learner.call("start", address=address, state=state)
