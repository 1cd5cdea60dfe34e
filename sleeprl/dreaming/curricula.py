"""The built-in curricula, and the actor that runs one, a built-in or a user's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from sleeprl.cluster.remote_actor import RemoteActor
from sleeprl.dreaming.types import Curriculum, Outcome, Task
from sleeprl.plugins import create


class Uniform:
    """Every task once, in a random order, then again."""

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
    """Tasks whose probes are still unlikely come more often: P(task) ~ its last gap.

    Tasks that were not tried yet count as the largest gap so far, so each gets its turn.
    """

    def __init__(self, tasks: Sequence[Task], seed: int, floor: float = 0.02) -> None:
        """Begin with all tasks untried.

        Args:
            tasks: what to choose from.
            seed: of the choices.
            floor: smallest gap (nats) that counts, so that what is well known is rehearsed too.
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
    """A curriculum in a process of its own, so that a user's code cannot stall the loop."""

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
