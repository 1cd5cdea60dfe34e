"""Policy gradient: advantages within a group, the clipped objective, off-policy correction.

Shapes: B rows, R response positions. Log-probabilities are of the tokens that
were sampled, in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def group_advantages(
    rewards: Sequence[float | None], groups: Sequence[str], *, normalise: bool = True
) -> list[float | None]:
    """GRPO advantages: reward minus the mean of its group, over the group's deviation.

    ``None`` is unscored: such a row gets no advantage and does not enter the mean.
    A group with one scored row, or with equal rewards, teaches nothing: all zeros.
    """
    members: dict[str, list[int]] = {}
    for index, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        if reward is not None:
            members.setdefault(group, []).append(index)
    advantages: list[float | None] = [None] * len(rewards)
    for rows in members.values():
        scores = np.array([rewards[i] for i in rows], dtype=np.float64)
        centred = scores - scores.mean()
        deviation = scores.std(ddof=1) if len(rows) > 1 else 0.0
        if normalise:
            centred = centred / deviation if deviation > 1e-8 else np.zeros_like(centred)
        for row, value in zip(rows, centred, strict=True):
            advantages[row] = float(value)
    return advantages


@dataclass(frozen=True)
class Correction:
    """Off-policy correction as level x mode, applied to the ratio learner / behaviour.

    level: ``token``; ``sequence`` (product over the response); ``geometric`` (its
        length-th root); or ``off``.
    mode: ``truncate`` caps the weight at ``high``; ``clip`` keeps it in
        [low, high]; ``mask`` drops tokens or sequences outside [low, high].
    """

    level: str = "token"
    mode: str = "truncate"
    low: float = 0.5
    high: float = 2.0

    def weights(self, learner_BR: Tensor, behaviour_BR: Tensor, mask_BR: Tensor) -> Tensor:
        """Detached weights [B, R]; 0 where ``mask_BR`` is 0."""
        log_ratio_BR = ((learner_BR - behaviour_BR) * mask_BR).detach()
        if self.level == "off":
            return mask_BR.float()
        if self.level != "token":
            total_B1 = log_ratio_BR.sum(-1, keepdim=True)
            if self.level == "geometric":
                total_B1 = total_B1 / mask_BR.sum(-1, keepdim=True).clamp_min(1)
            log_ratio_BR = total_B1.expand_as(log_ratio_BR)
        ratio_BR = log_ratio_BR.clamp(-20.0, 20.0).exp()
        if self.mode == "truncate":
            weights_BR = ratio_BR.clamp(max=self.high)
        elif self.mode == "clip":
            weights_BR = ratio_BR.clamp(self.low, self.high)
        else:
            weights_BR = ratio_BR * ((ratio_BR >= self.low) & (ratio_BR <= self.high))
        return weights_BR * mask_BR


def mismatch(learner_BR: Tensor, behaviour_BR: Tensor) -> dict[str, Tensor]:
    """How far the learner's policy is from the one that sampled, per token; always recorded.

    ``mismatch_kl`` is the k3 estimate of KL(behaviour || learner), in nats.
    """
    log_ratio_BR = (learner_BR - behaviour_BR).detach().float().clamp(-20, 20)
    ratio_BR = log_ratio_BR.exp()
    return {"mismatch_kl": ratio_BR - 1.0 - log_ratio_BR, "ratio": ratio_BR}


def clipped_policy_loss(
    logprobs_BR: Tensor,
    proximal_BR: Tensor,
    advantages_B: Tensor,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """PPO's clipped objective with DAPO's two bounds, per token [B, R], to be minimised.

    proximal: the policy at the start of this update, detached. With one step per
    batch it equals the current one and the ratio is 1 in value, not in gradient.
    """
    ratio_BR = (logprobs_BR - proximal_BR.detach()).exp()
    advantages_B1 = advantages_B[:, None]
    clipped_BR = ratio_BR.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -torch.minimum(ratio_BR * advantages_B1, clipped_BR * advantages_B1)
