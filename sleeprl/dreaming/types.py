"""Types of dreaming: tasks, dreams, outcomes, and the protocols of rewards and curricula.

A reward's process imports this module, so it imports neither torch nor ray.
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
    """A task: dream about one document."""

    id: str
    document: int
    """Number of the document in its day."""
    message: str
    """User message that requests the dream: the experience and an instruction."""
    probes: tuple[tuple[str, str], ...]
    """Questions about the document that are held out from training, each with the answer of the
    self that reads the document."""
    examples: tuple[tuple[str, str], ...] = ()
    """Worked examples before the message, as (user, assistant) messages."""


@dataclass(frozen=True)
class Dream:
    """A dream, as a reward gets it."""

    task: Task
    text: str
    """The decoded dream."""
    token_ids: list[int]
    parsed: Any | None
    """Return value of ``DreamFormat.parse``, as plain JSON; None for a malformed dream."""
    gain: float | None
    """Log-likelihood (nats per token) that one small step of learning from the dream, without the
    experience in context, adds to the task's probes; None where there is nothing to learn from."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a task's group in one update."""

    task: str
    """Id of the task."""
    rewards: list[float]
    """Rewards of the dreams that are scored."""
    gap: float
    """Mean negative log-likelihood per token of the task's probes without the experience (nats):
    how much is left to learn."""


class Reward(Protocol):
    """A pure function of the dream. None means that the dream cannot be scored, which is not 0.

    It runs in a process of its own, which is killed after ``dreaming.reward_timeout_s`` seconds.
    """

    def __call__(self, dream: Dream) -> float | None: ...


class Curriculum(Protocol):
    """Chooses tasks.

    Its factory is called as ``factory(tasks=..., seed=..., **options)``.
    """

    def next(self, n: int) -> list[Task]:
        """Choose the tasks of the next ``n`` groups."""
        ...

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Receive the outcomes of an update.

        They include groups that were set aside because they taught nothing: mastered or impossible.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return plain JSON that restores the exact next choice."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of ``state_dict``."""
        ...


def algorithm_of(config: DreamingConfig) -> Algorithm:
    """Create the algorithm that a configuration names."""
    algorithm: Algorithm = create(config.algorithm, "algorithm", config.algorithm_options)
    return algorithm


def scores(dreams: Sequence[Trajectory], limit: int) -> RewardBatch:
    """Collect the rewards of dreams in the form that an algorithm takes.

    Args:
        dreams: Complete groups.
        limit: Largest number of tokens in a dream.
    """
    from sleeprl.algorithms.base import RewardBatch

    return RewardBatch(
        [d.reward for d in dreams],
        [d.uid.rpartition("-")[0] for d in dreams],  # the group: the uid without the attempt
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
    """Build the request for a group of dreams. It is deterministic.

    Args:
        config: Sampling of dreams.
        seed: Seed of the night.
        number: Number of the group.
        task: Task of the group.
        build_prompt: Builds the token ids of the task's prompt.
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
