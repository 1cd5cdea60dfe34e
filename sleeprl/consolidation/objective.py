"""The objective of Knowledge Seeding, J_KS, as weights of streams (method 2.4, 6.4).

    J_KS = (1 - alpha) * E[r]  -  alpha * E[F(teacher || student)]           (step 3)
    F    = lambda * (on the student's rollouts)  + (1 - lambda) * (on the teacher's texts)
                                                                            (step 1)

What is minimised is -J_KS: ``pg`` is the loss of E[r], ``kl`` is F. With lambda = 1 it
is the paper's printed objective, which is GKD's reinforcement form (2306.13649, eq. 5).
"""

from __future__ import annotations

from dataclasses import dataclass

from sleeprl.losses.types import LossWeights


@dataclass(frozen=True)
class SeedingWeights:
    """Loss weights of the two kinds of text."""

    texts: LossWeights
    """Written by the teacher."""
    rollouts: LossWeights
    """Written by the student."""


def on_policy_share(step: int, start: float, warmup: int = 0) -> float:
    """Return lambda at ``step``: ``start`` for good, or rising on a line to 1 over ``warmup`` steps.

    A student that knows nothing yet writes poor texts to learn from, so teacher texts
    come first (method 6.1). warmup: 0 keeps lambda constant.
    """
    if not 0.0 <= start <= 1.0:
        raise ValueError(f"start={start} must lie in [0, 1]")
    if warmup <= 0:
        return start
    return start + (1.0 - start) * min(1.0, step / warmup)


def seeding_weights(
    step: int,
    *,
    alpha: float,
    on_policy: float,
    on_policy_warmup: int = 0,
    seed_steps: int = 0,
    ce: float = 0.0,
) -> SeedingWeights:
    """Return the weights of -J_KS at ``step`` (from 0): a function of its arguments only.

    Args:
        step: Of the consolidation.
        alpha: Divergence against imitation reward.
        on_policy, on_policy_warmup: lambda, see ``on_policy_share``.
        seed_steps: In so many first steps the objective is that of alpha = 1, divergence only; then it
            is joint (method 6.4). 0 is joint from the start.
        ce: Weight of the cross-entropy on teacher texts (method 6.2; 0 is the paper). It stands beside
            J_KS: neither alpha nor lambda scales it.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha={alpha} must lie in [0, 1]")
    if step < seed_steps:
        alpha = 1.0
    share = on_policy_share(step, on_policy, on_policy_warmup)
    return SeedingWeights(
        texts=LossWeights(ce=ce, kl=alpha * (1.0 - share)),
        rollouts=LossWeights(pg=1.0 - alpha, kl=alpha * share),
    )
