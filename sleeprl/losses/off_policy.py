"""Off-policy correction, and the mismatch between two policies.

Shapes: B rows, R response positions. Log-probabilities are those of the sampled tokens, in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ImportanceWeight:
    """Off-policy correction as level x mode, applied to the ratio trainer policy / rollout policy."""

    level: str = "token"
    """``token``; ``sequence`` (product over the response); ``geometric`` (geometric mean over the
    response); or ``off``."""
    mode: str = "truncate"
    """``truncate`` caps the weight at ``high``; ``clip`` clamps it to [low, high]; ``mask`` drops
    tokens or sequences outside of [low, high]."""
    low: float = 0.5
    """Lower bound of the ratio."""
    high: float = 2.0
    """Upper bound of the ratio."""

    def weights(self, trainer_BR: Tensor, rollout_BR: Tensor, mask_BR: Tensor) -> Tensor:
        """Compute the importance weights, without gradient.

        Args:
            trainer_BR: Log-probabilities under the trainer's policy.
            rollout_BR: Log-probabilities under the policy that sampled.
            mask_BR: 1 on response tokens.

        Returns:
            Weights [B, R], 0 where ``mask_BR`` is 0.
        """
        if self.level == "off":
            return mask_BR.float()
        ratio_BR = self._ratio(trainer_BR, rollout_BR, mask_BR)
        if self.mode == "truncate":
            weights_BR = ratio_BR.clamp(max=self.high)
        elif self.mode == "clip":
            weights_BR = ratio_BR.clamp(self.low, self.high)
        else:
            weights_BR = ratio_BR * self._inside(ratio_BR)
        return weights_BR * mask_BR

    def outside(self, trainer_BR: Tensor, rollout_BR: Tensor, mask_BR: Tensor) -> Tensor:
        """Mark the tokens whose ratio is outside of [low, high].

        The level ``off`` uses the ratio of each token.

        Args:
            trainer_BR: Log-probabilities under the trainer's policy.
            rollout_BR: Log-probabilities under the policy that sampled.
            mask_BR: 1 on response tokens.

        Returns:
            1 on these tokens, else 0, [B, R].
        """
        ratio_BR = self._ratio(trainer_BR, rollout_BR, mask_BR)
        return ~self._inside(ratio_BR) * mask_BR

    def _inside(self, ratio_BR: Tensor) -> Tensor:
        return (ratio_BR >= self.low) & (ratio_BR <= self.high)

    def _ratio(self, trainer_BR: Tensor, rollout_BR: Tensor, mask_BR: Tensor) -> Tensor:
        log_ratio_BR = ((trainer_BR - rollout_BR) * mask_BR).detach()
        if self.level not in ("token", "off"):
            total_B1 = log_ratio_BR.sum(-1, keepdim=True)
            if self.level == "geometric":
                total_B1 = total_B1 / mask_BR.sum(-1, keepdim=True).clamp_min(1)
            log_ratio_BR = total_B1.expand_as(log_ratio_BR)
        return log_ratio_BR.clamp(-20.0, 20.0).exp()


def mismatch_metrics(trainer_BR: Tensor, rollout_BR: Tensor) -> dict[str, Tensor]:
    """Measure per token how far the trainer's policy is from the policy that sampled.

    Args:
        trainer_BR: Log-probabilities under the trainer's policy.
        rollout_BR: Log-probabilities under the policy that sampled.

    Returns:
        ``mismatch_kl``, the k3 estimate of KL(rollout policy || trainer) in nats, and ``ratio``,
        both [B, R].
    """
    log_ratio_BR = (trainer_BR - rollout_BR).detach().float().clamp(-20, 20)
    ratio_BR = log_ratio_BR.exp()
    return {"mismatch_kl": ratio_BR - 1.0 - log_ratio_BR, "ratio": ratio_BR}
