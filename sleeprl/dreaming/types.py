"""What to dream about: tasks, dreams, the protocols that users plug into, and the algorithm's view.

A reward's process imports it, so neither torch nor ray is imported with it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sleeprl.config.schema import DreamingConfig
from sleeprl.plugins import create
from sleeprl.rollout.types import RolloutRequest, SamplingParams

if TYPE_CHECKING:
    from sleeprl.algorithms.base import Algorithm, RewardBatch
    from sleeprl.data.trajectory import Trajectory


@dataclass(frozen=True)
class Task:
    """Dream about one document.

    message: the user message of the dream writer, experience and instruction.
    probes: (question, answer of the self that reads) pairs, kept out of training.
    """

    id: str
    document: int
    message: str
    probes: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Dream:
    """One dream, as a reward sees it.

    pair: the question and answer it consists of; None when it is not well-formed.
    gain: by how much one small step of learning from it, without the experience in
        sight, raises the log-likelihood of the task's probes (nats per token);
        None when there was nothing to learn from.
    """

    task: Task
    text: str
    token_ids: list[int]
    pair: tuple[str, str] | None
    gain: float | None


@dataclass(frozen=True)
class Outcome:
    """What came of one task's group. gap: mean negative log-likelihood per token of the
    task's probes without the experience (nats): how much is left to learn there."""

    task: str
    rewards: list[float]
    gap: float


class Reward(Protocol):
    """A pure function of the dream. None means it cannot be scored, which is not 0.

    It runs in a process of its own, which is killed where it takes ``dreaming.reward_timeout_s``.
    """

    def __call__(self, dream: Dream) -> float | None: ...


class Curriculum(Protocol):
    """Chooses tasks. ``observe`` hears after each update of its groups, and of those that were set
    aside for them because they taught nothing: mastered or impossible. ``state_dict``, which is
    plain JSON, restores the exact next choice.

    A factory of one is called as ``factory(tasks=..., seed=..., **options)``.
    """

    def next(self, n: int) -> list[Task]: ...

    def observe(self, outcomes: Sequence[Outcome]) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def algorithm_of(config: DreamingConfig) -> Algorithm:
    algorithm: Algorithm = create(config.algorithm, "algorithm", config.algorithm_options)
    return algorithm


def scores(dreams: Sequence[Trajectory], limit: int) -> RewardBatch:
    """What an algorithm makes advantages of. limit: tokens that a dream may have."""
    from sleeprl.algorithms.base import RewardBatch

    return RewardBatch(
        [d.reward for d in dreams],
        [d.uid.rpartition("-")[0] for d in dreams],  # without the attempt: written together
        [len(d.response_ids) for d in dreams],
        limit,
    )


def request(
    config: DreamingConfig,
    seed: int,
    number: int,
    task: Task,
    build_prompt: Callable[[str], list[int]],
) -> RolloutRequest:
    """Build the request for the group of that number; the same whenever that is."""
    rng = random.Random(f"{seed}-dream-{number}")
    return RolloutRequest(
        task_id=task.id,
        uids=tuple(f"dream-{number}-{attempt}" for attempt in range(config.group_size)),
        prompt_ids=build_prompt(task.message),
        sampling=tuple(
            SamplingParams(config.max_tokens, config.temperature, rng.randrange(2**31))
            for _ in range(config.group_size)
        ),
    )
