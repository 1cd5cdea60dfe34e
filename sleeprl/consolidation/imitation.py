"""Student roll-outs for seeding: continue a teacher's text, be paid for agreeing with it.

The same roll-outs carry the on-policy divergence and the imitation reward
(method 2.4: the cheapest reading of the joint objective).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sleeprl.actors.engine import Completion, Sampling
from sleeprl.actors.learner import Row
from sleeprl.chat import Chat
from sleeprl.config import ConsolidationConfig
from sleeprl.losses.imitation import imitation_reward
from sleeprl.losses.policy import group_advantages
from sleeprl.trajectories.schema import Trajectory


@dataclass(frozen=True)
class Continuation:
    """A teacher text cut in two: the student is given ``prefix`` and must find ``rest``."""

    source: Trajectory
    prefix: list[int]
    rest: list[int]

    @property
    def prompt(self) -> list[int]:
        return self.source.prompt_ids + self.prefix


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
) -> tuple[list[list[int]], list[Sampling]]:
    """Prompts and sampling, ``group_size`` in a row for each; a little longer than the rest."""
    prompts, sampling = [], []
    for continuation in continuations:
        for _ in range(config.group_size):
            prompts.append(continuation.prompt)
            sampling.append(Sampling(len(continuation.rest) + 8, 1.0, rng.randrange(2**31)))
    return prompts, sampling


def rows(
    continuations: Sequence[Continuation],
    completions: Sequence[Completion],
    config: ConsolidationConfig,
    chat: Chat,
) -> tuple[list[Row], dict[str, float]]:
    """Rows of the part ``student``, with GRPO advantages (mean only, Dr.GRPO), and their mean reward."""
    owners = [c for c in continuations for _ in range(config.group_size)]
    rewards = [
        imitation_reward(
            completion.token_ids,
            owner.rest,
            chat.decode(completion.token_ids),
            chat.decode(owner.rest),
            gamma=config.semantic,
            threshold=config.edit_threshold,
        )
        for owner, completion in zip(owners, completions, strict=True)
    ]
    groups = [str(index // config.group_size) for index in range(len(owners))]
    advantages = group_advantages(rewards, groups, normalise=False)
    made = []
    for owner, completion, advantage in zip(owners, completions, advantages, strict=True):
        if not completion.token_ids:
            continue
        teacher = owner.source.teacher_prompt_ids
        made.append(
            Row(
                prompt_ids=owner.prompt,
                response_ids=completion.token_ids,
                part="student",
                teacher_prompt_ids=None if teacher is None else teacher + owner.prefix,
                advantage=advantage or 0.0,
                behaviour=completion.logprobs,
            )
        )
    new = [
        r for r, owner in zip(rewards, owners, strict=True) if owner.source.purpose == "self_study"
    ]
    metrics = {"imitation_reward": sum(rewards) / max(1, len(rewards))}
    if new:
        metrics["imitation_reward_new"] = sum(new) / len(new)
    return made, metrics
