"""Student rollouts for seeding: continue a teacher's text, be rewarded for agreeing with it.

The same rollouts carry the on-policy divergence and the imitation reward
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
from sleeprl.losses.types import LossOptions
from sleeprl.rollout.types import Completion, SamplingParams
from sleeprl.text.chat import ChatFormatter
from sleeprl.trainer.batching import TrainingExample

Score = tuple[float, float | None]
"""Reward and advantage of a rollout."""
SLACK = 8
"""Tokens that a rollout may be longer than what the teacher wrote."""


@dataclass(frozen=True)
class Continuation:
    """A teacher text cut in two: the student is given ``prefix`` and must find ``rest``."""

    source: Trajectory
    prefix: list[int]
    rest: list[int]

    @property
    def prompt(self) -> list[int]:
        """What the student is given, in token ids."""
        return self.source.prompt_ids + self.prefix

    @property
    def teacher_prompt(self) -> list[int] | None:
        """What the teacher is given, where that is more."""
        teacher = self.source.teacher_prompt_ids
        return None if teacher is None else teacher + self.prefix


def longest_rollout(texts: Sequence[Trajectory]) -> int:
    """Return the most tokens that a rollout on one of these texts can have."""
    return SLACK + max((len(text.response_ids) for text in texts), default=0)


def draw(
    texts: Sequence[Trajectory], count: int, config: ConsolidationConfig, rng: random.Random
) -> list[Continuation]:
    """Draw ``count`` texts with replacement, each cut after a random share of its tokens."""
    drawn = []
    for text in rng.choices(texts, k=count):
        share = rng.uniform(config.prefix_min, config.prefix_max)
        cut = int(share * len(text.response_ids))
        drawn.append(Continuation(text, text.response_ids[:cut], text.response_ids[cut:]))
    return drawn


def build_requests(
    continuations: Sequence[Continuation], config: ConsolidationConfig, rng: random.Random
) -> tuple[list[list[int]], list[SamplingParams]]:
    """Return prompts and sampling, ``group_size`` in a row for each; a little longer than the rest."""
    prompts, sampling = [], []
    for continuation in continuations:
        for _ in range(config.group_size):
            prompts.append(continuation.prompt)
            sampling.append(
                SamplingParams(len(continuation.rest) + SLACK, 1.0, rng.randrange(2**31))
            )
    return prompts, sampling


def score_rollouts(
    continuations: Sequence[Continuation],
    completions: Sequence[Completion],
    config: ConsolidationConfig,
    chat: ChatFormatter,
    judge: Judge,
    loss: LossOptions,
) -> tuple[list[TrainingExample], dict[str, float], list[Score]]:
    """Reward the rollouts, and make training examples of the part ``student`` of them.

    Args:
        continuations: What was continued.
        completions: ``group_size`` in a row for each continuation.
        config: What the reward is made of.
        chat: Turns tokens into text for the judge.
        judge: Says how far two texts mean the same.
        loss: Its algorithm gives the advantages.

    Returns:
        The examples, none of a rollout without a token; the mean rewards; the score of each rollout.
    """
    owners = [c for c in continuations for _ in range(config.group_size)]
    rewards = _reward(owners, completions, config, chat, judge)
    groups = [str(index // config.group_size) for index in range(len(owners))]
    lengths = [len(completion.token_ids) for completion in completions]
    batch = RewardBatch(rewards, groups, lengths, loss.max_response_tokens)
    advantages = loss.algorithm.advantages(batch)
    examples = []
    for owner, completion, advantage in zip(owners, completions, advantages, strict=True):
        if not completion.token_ids:
            continue
        examples.append(
            TrainingExample(
                prompt_ids=owner.prompt,
                response_ids=completion.token_ids,
                part="student",
                teacher_prompt_ids=owner.teacher_prompt,
                advantage=advantage,
                rollout_logprobs=completion.logprobs,
            )
        )
    new = [
        r for r, owner in zip(rewards, owners, strict=True) if owner.source.purpose == "self_study"
    ]
    metrics = {"imitation_reward": sum(rewards) / max(1, len(rewards))}
    if new:
        metrics["imitation_reward_new"] = sum(new) / len(new)
    return examples, metrics, list(zip(rewards, advantages, strict=True))


def _reward(
    owners: Sequence[Continuation],
    completions: Sequence[Completion],
    config: ConsolidationConfig,
    chat: ChatFormatter,
    judge: Judge,
) -> list[float]:
    """The imitation reward of each completion, against the text that its owner has cut off."""
    texts = [
        (chat.decode(completion.token_ids), chat.decode(owner.rest))
        for owner, completion in zip(owners, completions, strict=True)
    ]
    judgements = judge(texts) if config.semantic else [0.0] * len(texts)
    return [
        imitation_reward(
            completion.token_ids,
            owner.rest,
            judgement,
            gamma=config.semantic,
            threshold=config.edit_threshold,
            z0_mode=config.edit_mode,
        )
        for owner, completion, judgement in zip(owners, completions, judgements, strict=True)
    ]


def to_trajectories(
    prefix: str,
    continuations: Sequence[Continuation],
    completions: Sequence[Completion],
    config: ConsolidationConfig,
    scores: Sequence[Score] | None,
) -> list[Trajectory]:
    """Return rollouts as the lake keeps them, each with the text that it continues as its task.

    Args:
        prefix: Beginning of their uids.
        continuations: What was continued.
        completions: ``group_size`` in a row for each continuation.
        config: For the size of a group.
        scores: As ``score_rollouts`` gives them; None where nobody will learn from them.
    """
    made = []
    for index, completion in enumerate(completions):
        number, attempt = divmod(index, config.group_size)
        owner = continuations[number]
        reward, advantage = scores[index] if scores else (None, None)
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
                unscored=None if scores else "the job ended",
                advantage=advantage,
            )
        )
    return made
