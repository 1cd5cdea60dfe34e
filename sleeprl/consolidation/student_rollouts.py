"""Student roll-outs for seeding: continue a teacher's text, be paid for agreeing with it.

The same roll-outs carry the on-policy divergence and the imitation reward
(method 2.4: the cheapest reading of the joint objective).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sleeprl.algorithms.base import RewardBatch
from sleeprl.config.schema import ConsolidationConfig
from sleeprl.consolidation.imitation_reward import imitation_reward
from sleeprl.consolidation.judges import Judge
from sleeprl.data.trajectory import Trajectory
from sleeprl.losses.combined import LossOptions
from sleeprl.rollout.types import Completion, SamplingParams
from sleeprl.text.chat import ChatFormatter
from sleeprl.trainer.batching import TrainingExample

Judged = tuple[float, float | None]
"""Reward and advantage of a roll-out."""
SLACK = 8
"""Tokens that a roll-out may be longer than what the teacher wrote."""


@dataclass(frozen=True)
class Continuation:
    """A teacher text cut in two: the student is given ``prefix`` and must find ``rest``."""

    source: Trajectory
    prefix: list[int]
    rest: list[int]

    @property
    def prompt(self) -> list[int]:
        return self.source.prompt_ids + self.prefix

    @property
    def teacher_prompt(self) -> list[int] | None:
        teacher = self.source.teacher_prompt_ids
        return None if teacher is None else teacher + self.prefix


def longest(texts: Sequence[Trajectory]) -> int:
    """The most tokens that a roll-out on one of these texts can have."""
    return SLACK + max((len(text.response_ids) for text in texts), default=0)


def draw(
    texts: Sequence[Trajectory], count: int, config: ConsolidationConfig, rng: random.Random
) -> list[Continuation]:
    """``count`` texts, each cut after a random share of its tokens."""
    drawn = []
    for text in rng.choices(texts, k=count):
        share = rng.uniform(config.prefix_min, config.prefix_max)
        cut = int(share * len(text.response_ids))
        drawn.append(Continuation(text, text.response_ids[:cut], text.response_ids[cut:]))
    return drawn


def requests(
    continuations: Sequence[Continuation], config: ConsolidationConfig, rng: random.Random
) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts and sampling, ``group_size`` in a row for each; a little longer than the rest."""
    prompts, sampling = [], []
    for continuation in continuations:
        for _ in range(config.group_size):
            prompts.append(continuation.prompt)
            sampling.append(
                SamplingParams(len(continuation.rest) + SLACK, 1.0, rng.randrange(2**31))
            )
    return prompts, sampling


def rows(
    continuations: Sequence[Continuation],
    completions: Sequence[Completion],
    config: ConsolidationConfig,
    chat: ChatFormatter,
    judge: Judge,
    loss: LossOptions,
) -> tuple[list[TrainingExample], dict[str, float], list[Judged]]:
    """Rows of the part ``student`` with the algorithm's advantages, their mean reward, and what
    became of each roll-out; of one without a token there is no row."""
    owners = [c for c in continuations for _ in range(config.group_size)]
    texts = [
        (chat.decode(completion.token_ids), chat.decode(owner.rest))
        for owner, completion in zip(owners, completions, strict=True)
    ]
    judgements = judge(texts) if config.semantic else [0.0] * len(texts)
    rewards = [
        imitation_reward(
            completion.token_ids,
            owner.rest,
            *text,
            gamma=config.semantic,
            threshold=config.edit_threshold,
            z0_mode=config.edit_mode,
            judgement=judgement,
        )
        for owner, completion, text, judgement in zip(
            owners, completions, texts, judgements, strict=True
        )
    ]
    groups = [str(index // config.group_size) for index in range(len(owners))]
    lengths = [len(completion.token_ids) for completion in completions]
    advantages = loss.policy.advantages(RewardBatch(rewards, groups, lengths, loss.limit))
    made = []
    for owner, completion, advantage in zip(owners, completions, advantages, strict=True):
        if not completion.token_ids:
            continue
        made.append(
            TrainingExample(
                prompt_ids=owner.prompt,
                response_ids=completion.token_ids,
                part="student",
                teacher_prompt_ids=owner.teacher_prompt,
                advantage=advantage,
                behaviour=completion.logprobs,
            )
        )
    new = [
        r for r, owner in zip(rewards, owners, strict=True) if owner.source.purpose == "self_study"
    ]
    metrics = {"imitation_reward": sum(rewards) / max(1, len(rewards))}
    if new:
        metrics["imitation_reward_new"] = sum(new) / len(new)
    return made, metrics, list(zip(rewards, advantages, strict=True))


def trajectories(
    prefix: str,
    continuations: Sequence[Continuation],
    completions: Sequence[Completion],
    config: ConsolidationConfig,
    judged: Sequence[Judged] | None,
) -> list[Trajectory]:
    """Roll-outs as the lake keeps them, each with the text that it goes on from as its task.

    prefix: of their uids. judged: as ``rows`` gives it; None where nobody will learn from them.
    """
    made = []
    for index, completion in enumerate(completions):
        number, attempt = divmod(index, config.group_size)
        owner = continuations[number]
        reward, advantage = judged[index] if judged else (None, None)
        made.append(
            Trajectory(
                uid=f"{prefix}-{number}-{attempt}",
                task_id=owner.source.uid,
                attempt=attempt,
                purpose="rollout",
                prompt_ids=owner.prompt,
                response_ids=completion.token_ids,
                logprobs=completion.logprobs,
                versions=completion.versions,
                finish_reason=completion.finish_reason,
                teacher_prompt_ids=owner.teacher_prompt,
                reward=reward,
                unscored=None if judged else "the job ended",
                advantage=advantage,
            )
        )
    return made
