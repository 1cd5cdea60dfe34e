"""What to dream about: tasks, dreams, and the two protocols that users plug into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


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
    """A pure function of the dream. None means it cannot be scored, which is not 0."""

    def __call__(self, dream: Dream) -> float | None: ...


class Curriculum(Protocol):
    """Chooses tasks. ``state_dict`` restores the exact next choice.

    A factory of one is called as ``factory(tasks=..., seed=..., **options)``.
    """

    def next(self, n: int) -> list[Task]: ...

    def observe(self, outcomes: Sequence[Outcome]) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
