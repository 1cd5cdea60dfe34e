"""PPO (1707.06347) with a critic and generalised advantage estimation (1506.02438)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sleeprl.algorithms.base import CriticAlgorithm, PolicyLossInputs, clipped_loss

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PPO(CriticAlgorithm):
    """Clipped ratios with advantages from a critic."""

    clip_low: float = 0.2
    """How far below 1 a ratio counts."""
    clip_high: float = 0.2
    """How far above 1 a ratio counts."""
    gamma: float = 1.0
    """Discount of the value one token later."""
    gae_lambda: float = 0.95
    """How far an advantage looks ahead: 0 is one step's error, 1 the whole return."""
    whiten: bool = True
    """Give the advantages of a batch mean 0 and deviation 1."""
    value_clip: float = 0.2
    """How far a value may move from what it was before the step, as TRL has it."""
    value_weight: float = 0.5
    """Weight of the critic's loss."""
    loss_aggregation: str = "token"
    """See ``Algorithm.loss_aggregation``."""

    def estimate_advantages(
        self, rewards: Sequence[float | None], values: Sequence[Sequence[float]]
    ) -> tuple[list[list[float] | None], list[list[float]]]:
        import torch

        raw = [
            None if reward is None else self._estimate_text(reward, row)
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

    def _estimate_text(self, reward: float, values: Sequence[float]) -> list[float]:
        advantages, advantage, next_value = [0.0] * len(values), 0.0, 0.0
        for step in reversed(range(len(values))):
            paid = reward if step == len(values) - 1 else 0.0
            error = paid + self.gamma * next_value - values[step]
            advantage = error + self.gamma * self.gae_lambda * advantage
            advantages[step], next_value = advantage, values[step]
        return advantages

    def surrogate(self, inputs: PolicyLossInputs) -> Tensor:
        ratio_BR = inputs.log_ratio_BR().exp()
        return clipped_loss(ratio_BR, inputs.advantages_BR, self.clip_low, self.clip_high)

    def value_loss(self, values_BR: Tensor, old_BR: Tensor, returns_BR: Tensor) -> Tensor:
        """Return half the squared error, of the value or the clipped value, whichever is worse."""
        near_BR = old_BR + (values_BR - old_BR).clamp(-self.value_clip, self.value_clip)
        return 0.5 * ((values_BR - returns_BR) ** 2).maximum((near_BR - returns_BR) ** 2)
