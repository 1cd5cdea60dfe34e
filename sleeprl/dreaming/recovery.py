"""Restarts what died while dreaming: engines one by one, trainer ranks all together. An engine that
lives, but did not end an update verified, is sent the weights again."""

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
    """Decides what a failure is, and restarts who died.

    Only retryable failures are recovered from. A restarted engine gets no work before it ends an
    update verified.
    """

    engines: ActorGroup
    learner: ActorGroup
    new_engine: Callable[[int], Any]
    """Starts the engine of an index, without waiting for it."""
    new_learner: Callable[[int], Any]
    """Starts the trainer actor of a rank, without waiting for it."""
    limit: int
    """How often something may be restarted."""
    on_restart: Callable[[str], None]
    """Receives a message for each restart: what, and why."""
    num_recoveries: int = 0
    """Restarts so far; actors that die together count once."""
    dead: dict[str, list[int]] = field(default_factory=dict)
    """Indices of the dead actors of each group, from ``classify`` to ``recover``."""

    def classify(self, failure: ActorFailure) -> bool:
        """Find out what a failure left behind.

        Returns:
            Whether an engine or a trainer rank is dead, or an engine stale.

        Raises:
            ActorFailure: it is not retryable, or there were too many.
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
        """Restart the dead.

        Returns:
            Whether the trainer went back to the checkpoint.
        """
        dead, self.dead = self.dead, {}
        engines, ranks = (dead.get(group.name, []) for group in (self.engines, self.learner))
        for index in engines:
            self.engines.replace(index, self.new_engine(index))
        if engines:
            self.engines.start(engines)
        if ranks:  # the other ranks wait for the dead one in a collective that will never end
            everyone = self.learner.present
            for index in everyone:
                self.learner.replace(index, self.new_learner(index))
            start_ranks(self.learner, checkpoint)
            self.learner.started(everyone)
            self.learner.updated(everyone)  # to the checkpoint's version
        return bool(ranks)


def start_ranks(learner: ActorGroup, checkpoint: DreamingCheckpoint) -> None:
    """Connect new trainer ranks, and let them continue from a checkpoint."""
    address = learner.call("rendezvous")[0]
    state = str(checkpoint.version_dir) if checkpoint.version else None
    learner.call("start", address=address, state=state)
