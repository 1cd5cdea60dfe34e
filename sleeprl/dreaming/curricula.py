"""The built-in curricula, and the actor that runs any curriculum."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from sleeprl.cluster.remote_actor import RemoteActor
from sleeprl.dreaming.types import Curriculum, Outcome, Task
from sleeprl.plugins import create


class Uniform:
    """A curriculum that draws every task once per round, in random order."""

    def __init__(self, tasks: Sequence[Task], seed: int) -> None:
        self.tasks = list(tasks)
        self.rng = random.Random(seed)
        self.order: list[int] = []

    def next(self, n: int) -> list[Task]:
        while len(self.order) < n:
            self.order += self.rng.sample(range(len(self.tasks)), len(self.tasks))
        chosen, self.order = self.order[:n], self.order[n:]
        return [self.tasks[i] for i in chosen]

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self.rng.getstate(), "order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        version, words, gauss = state["rng"]
        self.rng.setstate((version, tuple(words), gauss))
        self.order = list(state["order"])


class WeakSpots(Uniform):
    """A curriculum that prefers tasks whose probes are still unlikely: P(task) ~ its last gap.

    An untried task counts as the largest gap so far, so each task gets its turn.
    """

    def __init__(self, tasks: Sequence[Task], seed: int, floor: float = 0.02) -> None:
        """Create the curriculum with all tasks untried.

        Args:
            tasks: Tasks to choose from.
            seed: Seed of the choices.
            floor: Smallest gap that counts, in nats, so that well-known tasks are rehearsed too.
        """
        super().__init__(tasks, seed)
        self.floor = floor
        self.gaps: dict[str, float] = {}

    def next(self, n: int) -> list[Task]:
        unseen = max(self.gaps.values(), default=1.0)
        remaining = {t.id: max(self.floor, self.gaps.get(t.id, unseen)) for t in self.tasks}
        chosen: list[Task] = []
        while len(chosen) < n:
            pool = [t for t in self.tasks if t not in chosen[-len(self.tasks) + 1 :]] or self.tasks
            chosen += self.rng.choices(pool, [remaining[t.id] for t in pool])
        return chosen

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            self.gaps[outcome.task] = outcome.gap

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "gaps": self.gaps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.gaps = dict(state["gaps"])


class CurriculumActor(RemoteActor):
    """A curriculum in a process of its own, so that user code cannot stall the loop."""

    def __init__(
        self, name: str, options: dict[str, Any], tasks: Sequence[Task], seed: int
    ) -> None:
        self.curriculum: Curriculum = create(
            name, "curriculum", {**options, "tasks": list(tasks), "seed": seed}
        )

    def next(self, n: int) -> list[Task]:
        return self.curriculum.next(n)

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        self.curriculum.observe(outcomes)

    def state_dict(self) -> dict[str, Any]:
        return self.curriculum.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.curriculum.load_state_dict(state)
