"""PPO (1707.06347) with a critic and generalised advantage estimation (1506.02438)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sleeprl.algorithms.base import Advantages, PolicyLossInputs, RewardBatch, clipped


@dataclass(frozen=True)
class PPO:
    """discount: gamma. trace: lambda. whiten: advantages of a batch get mean 0 and deviation 1.

    value_clip: how far a value may move from what it was when the text was judged, as TRL and
    the first implementation have it. value_weight: of the critic's loss.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    discount: float = 1.0
    trace: float = 0.95
    whiten: bool = True
    value_clip: float = 0.2
    value_weight: float = 0.5
    mean: str = "token"

    def advantages(self, scores: RewardBatch) -> Advantages:
        """The reward itself, where there is one: what ``estimate`` starts from."""
        return list(scores.rewards)

    def estimate(
        self, rewards: Sequence[float | None], values: Sequence[Sequence[float]]
    ) -> tuple[list[list[float] | None], list[list[float]]]:
        """Advantages and returns of every token, from the critic's values before the step.

        rewards: of whole texts, paid at their last token. ``None`` gives no advantages, and
        returns that are the values themselves, from which the critic learns nothing.
        """
        raw = [
            None if reward is None else self._trace(reward, row)
            for reward, row in zip(rewards, values, strict=True)
        ]
        returns = [
            list(row) if a is None else [x + v for x, v in zip(a, row, strict=True)]
            for a, row in zip(raw, values, strict=True)
        ]
        flat = torch.tensor([x for a in raw if a for x in a], dtype=torch.float64)
        if not self.whiten or len(flat) < 2:
            return raw, returns
        mean, deviation = float(flat.mean()), float(flat.std()) + 1e-8
        return [a and [(x - mean) / deviation for x in a] for a in raw], returns

    def _trace(self, reward: float, values: Sequence[float]) -> list[float]:
        found, carried, following = [0.0] * len(values), 0.0, 0.0
        for step in reversed(range(len(values))):
            paid = reward if step == len(values) - 1 else 0.0
            surprise = paid + self.discount * following - values[step]
            carried = surprise + self.discount * self.trace * carried
            found[step], following = carried, values[step]
        return found

    def surrogate(self, sampled: PolicyLossInputs) -> Tensor:
        ratio_BR = sampled.log_ratio_BR().exp()
        return clipped(ratio_BR, sampled.advantages_BR, self.clip_low, self.clip_high)

    def value_loss(self, values_BR: Tensor, old_BR: Tensor, returns_BR: Tensor) -> Tensor:
        """Half the squared error per token [B, R], the worse of the value and the clipped value."""
        near_BR = old_BR + (values_BR - old_BR).clamp(-self.value_clip, self.value_clip)
        return 0.5 * torch.maximum((values_BR - returns_BR) ** 2, (near_BR - returns_BR) ** 2)
