"""Builds the trainer's examples from dreams, one kind for each part of the loss."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

from sleeprl.algorithms.base import Algorithm, CriticAlgorithm
from sleeprl.config.schema import DreamingConfig
from sleeprl.data.trajectory import Trajectory
from sleeprl.dreaming.formats import format_of
from sleeprl.dreaming.types import scores
from sleeprl.losses.types import LossWeights
from sleeprl.text.chat import ChatFormatter
from sleeprl.trainer.batching import TrainingExample

DREAM, LEARN, HOLD = "dream", "learn", "hold"
"""Parts of the loss: the policy gradient on the dreams, the cross-entropy on what the dreams teach,
and the divergence from the smaller self on its own texts."""

EstimateValues = Callable[[Sequence[TrainingExample]], list[list[float]]]
"""Computes the critic's value at each response token of each example."""


class LessonBuilder:
    """Builds training examples from the dreams of an update."""

    def __init__(
        self,
        config: DreamingConfig,
        algorithm: Algorithm,
        chat: ChatFormatter,
        replay: Sequence[Trajectory],
        seed: int,
    ) -> None:
        """Create the builder.

        Args:
            config: Weights of the parts of the loss, and the format of dreams.
            algorithm: Computes advantages from rewards.
            chat: Chat format of the trained model.
            replay: Texts that the smaller self wrote freely; the third part of the loss preserves
                them.
            seed: Seed of the night.
        """
        self.algorithm, self.chat, self.replay, self.seed = algorithm, chat, replay, seed
        self.format, self.limit = format_of(config), config.max_tokens
        self.parts = {
            DREAM: LossWeights(pg=config.loss.policy_gradient),
            LEARN: LossWeights(ce=config.loss.sft),
            HOLD: LossWeights(kl=config.loss.replay_kl),
        }

    def policy_rows(
        self,
        dreams: Sequence[Trajectory],
        stale: Sequence[int],
        version: int,
        estimate_values: EstimateValues,
    ) -> list[TrainingExample | None]:
        """Build an example of each dream for the policy gradient.

        Args:
            dreams: Complete groups.
            stale: Number of leading tokens of each dream that are too old to learn from; they
                become part of the prompt.
            version: Policy version that the update produces.
            estimate_values: The critic; called if the algorithm needs one.

        Returns:
            One example per dream; None where it has no advantage or no token to learn from.
        """
        advantages = self.algorithm.advantages(scores(dreams, self.limit))
        rows = [
            TrainingExample(
                prompt_ids=d.prompt_ids + d.response_ids[:n],
                response_ids=d.response_ids[n:],
                part=DREAM,
                advantage=advantage,
                rollout_logprobs=d.logprobs[n:],
                age=version - min(d.versions),
                reference_logprobs=(d.ref_logprobs or [])[n:],
            )
            if advantage is not None and d.response_ids[n:]
            else None
            for d, advantage, n in zip(dreams, advantages, stale, strict=True)
        ]
        if not self.algorithm.needs_critic:
            return rows
        algorithm = cast("CriticAlgorithm", self.algorithm)
        present = [row for row in rows if row is not None]
        values = estimate_values(present)
        rewards = [row.advantage for row in present if not isinstance(row.advantage, list)]
        found = zip(present, values, *algorithm.estimate_advantages(rewards, values), strict=True)
        estimated = iter(
            [
                replace(row, advantage=advantage, values=expected, returns=returns)
                for row, expected, advantage, returns in found
            ]
        )
        return [row and next(estimated) for row in rows]

    def auxiliary_rows(self, dreams: Sequence[Trajectory], step: int) -> list[TrainingExample]:
        """Build examples of what rewarded dreams teach, and of the smaller self's own texts.

        Args:
            dreams: The dreams of the update.
            step: Number of the update; it seeds the draw of the texts.
        """
        rows = []
        for dream in dreams:
            if dream.parsed is None or dream.reward is None or dream.reward <= 0:
                continue
            for message, response in self.format.training_pairs(json.loads(dream.parsed)):
                ids = self.chat.prompt(message), self.chat.response(response)
                rows.append(TrainingExample(*ids, LEARN))
        if self.replay:
            rng = random.Random(f"{self.seed}-hold-{step}")
            rows += [
                TrainingExample(t.prompt_ids, t.response_ids, HOLD, key=t.uid)
                for t in rng.choices(self.replay, k=len(dreams))
            ]
        return rows
