"""The objective of Knowledge Seeding, J_KS, as weights of streams (the paper's steps 1 to 3).

    J_KS = (1 - alpha) * E[r]  -  alpha * E[F(teacher || student)]           (step 3)
    F    = lambda * (on the student's rollouts)  + (1 - lambda) * (on the teacher's texts)
                                                                            (step 1)

The loss is -J_KS: ``pg`` is the loss of E[r], ``kl`` is F. With lambda = 1 it is the paper's
printed objective, which is GKD's reinforcement form (2306.13649, eq. 5).
"""

from __future__ import annotations

from dataclasses import dataclass

from sleeprl.losses.types import LossWeights


@dataclass(frozen=True)
class SeedingWeights:
    """Loss weights of the two kinds of text."""

    texts: LossWeights
    """Weights for texts of the teacher."""
    rollouts: LossWeights
    """Weights for rollouts of the student."""


def on_policy_share(step: int, start: float, warmup: int = 0) -> float:
    """Return lambda at ``step``: constant ``start``, or a linear warm-up from ``start`` to 1.

    A student without the new knowledge writes poor texts to train on, so teacher texts come first.

    Args:
        step: Number of the optimizer step, from 0.
        start: lambda at step 0, in [0, 1].
        warmup: Steps until lambda is 1; 0 makes it constant.

    Raises:
        ValueError: ``start`` is outside of [0, 1].
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
    """Return the weights of -J_KS at ``step``, a pure function of its arguments.

    Args:
        step: Number of the optimizer step, from 0.
        alpha: Weight of the divergence against the imitation reward, in [0, 1].
        on_policy: lambda at step 0, see ``on_policy_share``.
        on_policy_warmup: Steps until lambda is 1, see ``on_policy_share``.
        seed_steps: Number of first steps with alpha = 1, that is divergence only; after them the
            objective is joint. 0 is joint from the start.
        ce: Weight of the cross-entropy on teacher texts (0 in the paper). It is added
            to J_KS and not scaled by alpha or lambda.

    Raises:
        ValueError: ``alpha`` or ``on_policy`` is outside of [0, 1].
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
