"""What is asked of a rollout engine and what it returns. Plain values; imports neither ray nor torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

RUNNING = "running"
"""The finish reason of a response that is not at its end."""


@dataclass(frozen=True)
class SamplingParams:
    """How one response is sampled.

    There is no top-p or top-k. A token's probability is then one among the few that were left
    to choose from, and the trainer's ratio to it is wrong unless it knows these, for every
    token. vLLM 0.32 can return them (``return_sampling_mask``, with Triton), but such an
    engine refuses greedy requests, and every request without a top-k.
    """

    max_tokens: int
    """The most tokens of the response, a prefix that it continues included."""
    temperature: float = 1.0
    """0 is greedy."""
    seed: int | None = None
    """Makes the tokens of this request repeatable, whatever runs beside it."""


@dataclass(frozen=True)
class Completion:
    """One response. The three lists have one entry per token."""

    token_ids: list[int]
    logprobs: list[float]
    """Of the distribution that was sampled from (after temperature), in nats."""
    versions: list[int]
    """The policy version whose weights sampled each token."""
    finish_reason: str
    """``stop``, ``length``, or ``running`` for a response that has to be continued."""


EMPTY = Completion([], [], [], RUNNING)
"""A response of which there is no token yet."""

ObjectRef: TypeAlias = Any
"""A reference into Ray's object store, which is Any to a type checker."""

PartialGroups: TypeAlias = Mapping[str, ObjectRef]
"""Groups that are being generated, by group uid: a reference to a record batch of each."""


@dataclass(frozen=True)
class RolloutRequest:
    """A group of responses to one prompt."""

    task_id: str
    uids: tuple[str, ...]
    """One per response: the group's uid, a hyphen, and the number of the attempt."""
    prompt_ids: list[int]
    sampling: tuple[SamplingParams, ...]
    """One per response."""

    @property
    def group_uid(self) -> str:
        return self.uids[0].rpartition("-")[0]


@dataclass(frozen=True)
class RolloutResult:
    """A group as an engine leaves it. The data itself stays in the object store."""

    batch: ObjectRef
    """A record batch of trajectories, one per response, in the order of the request."""
    num_tokens: int
    """Response tokens in the batch, those of a prefix included."""
    oldest_last_version: int | None
    """The smallest of the versions of the responses' last tokens; None where there is no token."""
    incomplete_reason: str | None = None
    """Why the rest has to be requested again; None for a group that is complete."""
    stale: tuple[ObjectRef, ...] = ()
    """Batches of earlier responses that were generated again, since all of their tokens were too old."""


def truncate_to_version(version: int, completion: Completion) -> Completion:
    """Drop what was sampled after a version; what is dropped has to be generated again."""
    end = next((n for n, of in enumerate(completion.versions) if of > version), None)
    if end is None:
        return completion
    return Completion(
        completion.token_ids[:end], completion.logprobs[:end], completion.versions[:end], RUNNING
    )


def concat_completions(first: Completion, rest: Completion) -> Completion:
    """Append the continuation of a response to its beginning."""
    return Completion(
        first.token_ids + rest.token_ids,
        first.logprobs + rest.logprobs,
        first.versions + rest.versions,
        rest.finish_reason,
    )
