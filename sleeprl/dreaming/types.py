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
    """Dream about one document."""

    id: str
    document: int
    """Number of the document in its day."""
    message: str
    """The user's message that asks for the dream: the experience and an instruction."""
    probes: tuple[tuple[str, str], ...]
    """Questions about the document, each with the answer of the self that reads it; they are kept out
    of training."""
    examples: tuple[tuple[str, str], ...] = ()
    """Worked examples before the message: messages of the user and of the assistant."""


@dataclass(frozen=True)
class Dream:
    """One dream, as a reward sees it."""

    task: Task
    text: str
    token_ids: list[int]
    parsed: Any | None
    """What ``DreamFormat.parse`` returned, as plain JSON; None for a malformed dream."""
    gain: float | None
    """What one small step of learning from the dream, without the experience in sight, adds to the
    log-likelihood of the task's probes (nats per token); None where there is nothing to learn from."""


@dataclass(frozen=True)
class Outcome:
    """What came of one task's group."""

    task: str
    """Id of the task."""
    rewards: list[float]
    """Rewards of the dreams that have one."""
    gap: float
    """Mean negative log-likelihood per token of the task's probes without the experience (nats): how
    much is left to learn there."""


class Reward(Protocol):
    """A pure function of the dream. None means that it cannot be scored, which is not 0.

    It runs in a process of its own, which is killed where it takes ``dreaming.reward_timeout_s``.
    """

    def __call__(self, dream: Dream) -> float | None: ...


class Curriculum(Protocol):
    """Chooses tasks.

    A factory of one is called as ``factory(tasks=..., seed=..., **options)``.
    """

    def next(self, n: int) -> list[Task]:
        """Choose the tasks of the next ``n`` groups."""
        ...

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Hear after each update of its groups, and of those that were set aside for them because
        they taught nothing: mastered or impossible."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return plain JSON that restores the exact next choice."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        ...


def algorithm_of(config: DreamingConfig) -> Algorithm:
    """Create the algorithm that a configuration names."""
    algorithm: Algorithm = create(config.algorithm, "algorithm", config.algorithm_options)
    return algorithm


def scores(dreams: Sequence[Trajectory], limit: int) -> RewardBatch:
    """Give dreams the form from which an algorithm makes advantages.

    Args:
        dreams: whole groups.
        limit: tokens that a dream may have.
    """
    from sleeprl.algorithms.base import RewardBatch

    return RewardBatch(
        [d.reward for d in dreams],
        [d.uid.rpartition("-")[0] for d in dreams],  # without the attempt: written together
        [len(d.response_ids) for d in dreams],
        limit,
    )


def build_request(
    config: DreamingConfig,
    seed: int,
    number: int,
    task: Task,
    build_prompt: Callable[[Task], list[int]],
) -> RolloutRequest:
    """Build the request for a group of dreams; the same whenever it is built.

    Args:
        config: how dreams are sampled.
        seed: of the night.
        number: of the group.
        task: what the group is about.
        build_prompt: turns the task into token ids.
    """
    rng = random.Random(f"{seed}-dream-{number}")
    return RolloutRequest(
        task_id=task.id,
        uids=tuple(f"dream-{number}-{attempt}" for attempt in range(config.group_size)),
        prompt_ids=build_prompt(task),
        sampling=tuple(
            SamplingParams(config.max_tokens, config.temperature, rng.randrange(2**31))
            for _ in range(config.group_size)
        ),
    )
