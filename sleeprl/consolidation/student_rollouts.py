"""Student rollouts for seeding: continue a teacher's text and be rewarded for agreement with it.

The same rollouts are used for the on-policy divergence and the imitation reward (step 2: the
cheapest reading of the joint objective).
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
"""Tokens by which a rollout may exceed the teacher's continuation."""


@dataclass(frozen=True)
class Continuation:
    """A teacher text cut in two. The student continues ``prefix``; ``rest`` is the reference."""

    source: Trajectory
    """The teacher's text."""
    prefix: list[int]
    """Token ids of the response before the cut."""
    rest: list[int]
    """Token ids of the response after the cut."""

    @property
    def prompt(self) -> list[int]:
        """The student's prompt with the prefix, in token ids."""
        return self.source.prompt_ids + self.prefix

    @property
    def teacher_prompt(self) -> list[int] | None:
        """The teacher's prompt with the prefix, in token ids; None if it is the student's."""
        teacher = self.source.teacher_prompt_ids
        return None if teacher is None else teacher + self.prefix


def longest_rollout(texts: Sequence[Trajectory]) -> int:
    """Return the maximum number of tokens of a rollout on these texts."""
    return SLACK + max((len(text.response_ids) for text in texts), default=0)


def draw(
    texts: Sequence[Trajectory], count: int, config: ConsolidationConfig, rng: random.Random
) -> list[Continuation]:
    """Draw texts with replacement and cut each at a random share of its tokens.

    Args:
        texts: Texts of the teacher.
        count: Number of continuations.
        config: Bounds of the share, ``prefix_min`` and ``prefix_max``.
        rng: Source of randomness.
    """
    drawn = []
    for text in rng.choices(texts, k=count):
        share = rng.uniform(config.prefix_min, config.prefix_max)
        cut = int(share * len(text.response_ids))
        drawn.append(Continuation(text, text.response_ids[:cut], text.response_ids[cut:]))
    return drawn


def build_requests(
    continuations: Sequence[Continuation], config: ConsolidationConfig, rng: random.Random
) -> tuple[list[list[int]], list[SamplingParams]]:
    """Build the generation requests, ``group_size`` consecutive ones for each continuation.

    A rollout is at most ``SLACK`` tokens longer than the teacher's continuation.

    Args:
        continuations: The texts to continue.
        config: Settings with the ``group_size``.
        rng: Source of the sampling seeds.

    Returns:
        Prompts in token ids, and sampling parameters.
    """
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
    """Reward the rollouts and convert them to training examples of the part ``student``.

    Args:
        continuations: The texts that were continued.
        completions: ``group_size`` consecutive completions for each continuation.
        config: Settings of the reward.
        chat: Decodes tokens to text for the judge.
        judge: Judges whether two texts have the same meaning.
        loss: Options with the algorithm that computes the advantages.

    Returns:
        The examples, without those of empty rollouts; the mean rewards; the score of each rollout.
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
    """Return the imitation reward of each completion against the rest of its owner's text."""
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
    """Convert rollouts to trajectories for the lake; the task is the text that was continued.

    Args:
        prefix: Prefix of the uids.
        continuations: The texts that were continued.
        completions: ``group_size`` consecutive completions for each continuation.
        config: Settings with the ``group_size``.
        scores: Scores of ``score_rollouts``; None if no step will train on the rollouts.
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
