"""The decoupled actor-learner loop of dreaming, as one page of straight code.

    curriculum -> admission -> engines -> scorers -> reward -> queue -> learner -> engines

Everything between the arrows is in flight at the same time; the driver moves
references. What bounds it is admission: a group is admitted only while
``admitted < (staleness + version + 1) * tasks_per_step``, so no dream can be older
than ``staleness`` updates when it is learned from, and nothing is thrown away.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from sleeprl.actors.engine import Sampling
from sleeprl.actors.fleet import Fleet
from sleeprl.actors.group import ActorFailure, ActorGroup, Result
from sleeprl.chat import Chat
from sleeprl.config import DreamingConfig
from sleeprl.dreaming.tasks import Task

OnStep = Callable[[int, dict[str, float]], None]


@dataclass
class Counts:
    """Groups of dreams by where they are; the identity is asserted at every turn."""

    admitted: int = 0
    generating: int = 0
    scoring: int = 0
    rewarding: int = 0
    queued: int = 0
    learning: int = 0
    learned: int = 0

    def check(self) -> None:
        inside = self.generating + self.scoring + self.rewarding + self.queued + self.learning
        assert self.admitted == inside + self.learned, (
            f"a group of dreams was lost or doubled: {self}"
        )


@dataclass
class Pipeline:
    """The actors of one dreaming phase. ``learner`` ranks step together; ``scorers``,
    ``rewards`` and ``curriculum`` are groups of their own processes."""

    config: DreamingConfig
    tasks: Mapping[str, Task]
    engines: ActorGroup
    scorers: ActorGroup
    rewards: ActorGroup
    curriculum: ActorGroup
    learner: ActorGroup
    chat: Chat
    seed: int
    counts: Counts = field(default_factory=Counts)
    idle: dict[str, dict[str, float]] = field(default_factory=dict)

    def run(self, on_step: OnStep) -> None:
        """Learn ``config.steps`` times. Raises ActorFailure for what cannot be retried."""
        config, counts = self.config, self.counts
        version = 0
        to_score: deque[tuple[str, Any]] = deque()
        to_reward: deque[tuple[str, Any]] = deque()
        queue: deque[tuple[int, Any]] = deque()
        step: list[Any] = []
        batches: list[Any] = []
        began = time.monotonic()
        while version < config.steps:
            moved = self._admit(version)
            for result in self._ends(self.engines):
                to_score.append((result.tag, result.value["batch"]))
                counts.generating -= 1
                counts.scoring += 1
            for result in self._ends(self.scorers):
                to_reward.append((result.tag, result.value["batch"]))
                counts.scoring -= 1
                counts.rewarding += 1
            for result in self._ends(self.rewards):
                queue.append((int(result.tag), result.value["batch"]))
                counts.rewarding -= 1
                counts.queued += 1
            moved |= self._send(self.scorers, "score", to_score)
            moved |= self._send(self.rewards, "score", to_reward)
            if not step and len(queue) >= config.tasks_per_step:
                # Oldest first: a slow group must not be overtaken for ever.
                queue = deque(sorted(queue, key=lambda item: item[0]))
                batches = [queue.popleft()[1] for _ in range(config.tasks_per_step)]
                step = self.learner.send("step", [{"batches": batches}] * len(self.learner))
                counts.queued -= len(batches)
                counts.learning += len(batches)
                moved = True
            if step and len(ray.wait(step, num_returns=len(step), timeout=0)[0]) == len(step):
                version += 1
                metrics = self._learned(step)
                counts.learning -= len(batches)
                counts.learned += len(batches)
                on_step(version, metrics)
                step, moved = [], True
            counts.check()
            if not moved:
                time.sleep(0.005)
            began = self._account(began, bool(step))

    def _admit(self, version: int) -> bool:
        """Fill the room that the staleness bound leaves, one group per engine call."""
        config, counts = self.config, self.counts
        batch = config.tasks_per_step
        capacity = min((config.staleness + version + 1) * batch, config.steps * batch)
        moved = False
        while counts.admitted < capacity:
            number = counts.admitted
            (chosen,) = self.curriculum.call("next", n=1)
            task: Task = chosen[0]
            rng = random.Random(f"{self.seed}-dream-{number}")
            sampling = [
                Sampling(config.max_tokens, config.temperature, rng.randrange(2**31))
                for _ in range(config.group_size)
            ]
            sent = self.engines.submit(
                "rollout",
                str(number),
                task=task.id,
                attempts=[f"dream-{number}-{attempt}" for attempt in range(config.group_size)],
                prompt=self.chat.prompt(task.message),
                sampling=sampling,
            )
            if not sent:
                raise RuntimeError("no healthy rollout engine is left to dream on")
            counts.admitted += 1
            counts.generating += 1
            moved = True
        return moved

    def _send(self, group: ActorGroup, method: str, waiting: deque[tuple[str, Any]]) -> bool:
        moved = False
        while waiting:
            tag, batch = waiting[0]
            if not group.submit(method, tag, batch=batch, tasks=self.tasks):
                break
            waiting.popleft()
            moved = True
        return moved

    def _ends(self, group: ActorGroup) -> list[Result]:
        results = group.ready()
        for result in results:
            if result.failure is not None:
                raise ActorFailure(
                    f"{group.name}-{result.actor}, group {result.tag}", result.failure
                )
        return results

    def _learned(self, step: Sequence[Any]) -> dict[str, float]:
        """Publish the new weights to engines and scorers, and tell the curriculum."""
        outcome = self.learner.collect("step", step)[0]
        sent = self.learner.call("publish")[0]
        expert = sent.pop("expert")
        self.scorers.scatter("set_expert", [{"expert": expert}] * len(self.scorers))
        self.curriculum.call("observe", outcomes=outcome["outcomes"])
        sent.pop("version")
        return {**outcome["metrics"], **sent}

    def _account(self, since: float, learning: bool) -> float:
        """Seconds in which an actor had nothing to do, by what it waited for."""
        now = time.monotonic()
        states = (
            ("engines", self.engines.outstanding == 0, "gate"),
            ("scorers", self.scorers.outstanding == 0, "data"),
            ("learner", not learning, "data"),
        )
        for name, waits, kind in states:
            if waits:
                mine = self.idle.setdefault(name, {})
                mine[kind] = mine.get(kind, 0.0) + now - since
        return now


def fleet_group(fleet: Fleet, groups: int) -> ActorGroup:
    """The fleet's engines with room for all groups that admission may let in."""
    return ActorGroup("engine", fleet.group.actors, in_flight=groups)
