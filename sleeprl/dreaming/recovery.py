"""Restarting what died while dreaming: engines one by one, learner workers all together. An engine
that is there, but did not end an update verified, is sent the weights again."""

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
    """new_engine, new_learner: start the actor of an index, without waiting for it. limit: how
    often somebody may be restarted. on_restart: is told who is, and why.

    Only INFRA is mended. A restarted engine gets no work before it ends an update verified.
    """

    engines: ActorGroup
    learner: ActorGroup
    new_engine: Callable[[int], Any]
    new_learner: Callable[[int], Any]
    limit: int
    on_restart: Callable[[str], None]
    done: int = 0
    dead: dict[str, list[int]] = field(default_factory=dict)

    def diagnose(self, failure: ActorFailure) -> bool:
        """Whether an engine or a learner worker is dead, or an engine stale; raises what cannot be
        mended."""
        if failure.failure.kind is FailureKind.DATA:
            raise failure
        self.dead = {group.name: group.dead() for group in (self.engines, self.learner)}
        stale = [f"engine-{index}" for index in self.engines.health.having(HealthState.STALE)]
        died = [f"{name}-{index}" for name, found in self.dead.items() for index in found]
        if not (died or stale):
            return False
        if self.done >= self.limit:
            raise failure
        self.done += 1
        what = "died and will be restarted" if died else "is stale and gets the weights again"
        self.on_restart(
            f"{' and '.join(died or stale)} {what} "
            f"({self.done} of resources.max_failures={self.limit}): {failure.failure.message}"
        )
        return True

    def mend(self, position: DreamingCheckpoint) -> bool:
        """Restart who is dead. True where the learner went back to the position."""
        dead, self.dead = self.dead, {}
        engines, learners = (dead.get(group.name, []) for group in (self.engines, self.learner))
        for index in engines:
            self.engines.replace(index, self.new_engine(index))
        if engines:
            self.engines.start(engines)
        if learners:  # the others wait for it in a collective that will never end
            ranks = self.learner.present
            for index in ranks:
                self.learner.replace(index, self.new_learner(index))
            start_ranks(self.learner, position)
            self.learner.started(ranks)
            self.learner.updated(ranks)  # to the position's
        return bool(learners)


def start_ranks(learner: ActorGroup, position: DreamingCheckpoint) -> None:
    """Let new learner workers find each other and go on from a position."""
    address = learner.call("rendezvous")[0]
    state = str(position.checkpoint) if position.version else None
    learner.call("start", address=address, state=state)
