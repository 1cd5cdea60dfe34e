"""Policy-gradient estimators for the imitation reward (method 6.1, 6.3), by name.

An estimator says what an advantage is and which ratio its loss takes; the loss itself
is the ``pg`` stream, a mean over tokens. ``None`` in rewards is unscored. ``None`` in
advantages is a row that says nothing: no gradient, and not a zero to average with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from sleeprl.losses.policy import group_advantages

Rewards = Sequence[float | None]
Advantages = list[float | None]
SAME = 1e-8
"""Rewards of a group that differ by less are equal."""


def grpo_advantages(rewards: Rewards, groups: Sequence[str]) -> Advantages:
    """Reward minus its group's mean, not divided by the deviation (Dr.GRPO, 2503.20783).

    A group whose scored rewards are all equal is skipped (DAPO, 2503.14476): ``None``.
    """
    advantages = group_advantages(rewards, groups, normalise=False)
    live = {g for a, g in zip(advantages, groups, strict=True) if a is not None and abs(a) > SAME}
    return [a if g in live else None for a, g in zip(advantages, groups, strict=True)]


def rloo_advantages(rewards: Rewards, groups: Sequence[str]) -> Advantages:
    """Reward minus the mean of the *others* of its group (leave-one-out, 2402.14740).

    A row that is alone in its group has no baseline: ``None``.
    """
    sizes = dict.fromkeys(groups, 0)
    for reward, group in zip(rewards, groups, strict=True):
        sizes[group] += reward is not None
    centred = group_advantages(rewards, groups, normalise=False)
    # r - (S - r)/(n - 1) = n/(n - 1) * (r - S/n)
    return [
        None if a is None or sizes[g] < 2 else a * sizes[g] / (sizes[g] - 1)
        for a, g in zip(centred, groups, strict=True)
    ]


def reinforce_advantages(rewards: Rewards, groups: Sequence[str]) -> Advantages:
    """Reward minus the mean of the whole batch; groups play no part."""
    scored = [reward for reward in rewards if reward is not None]
    baseline = fmean(scored) if scored else 0.0
    return [None if reward is None else reward - baseline for reward in rewards]


@dataclass(frozen=True)
class Estimator:
    """advantages: of a batch's rewards and groups. proximal: see ``LossOptions``."""

    advantages: Callable[[Rewards, Sequence[str]], Advantages]
    proximal: str


ESTIMATORS = {
    # Clipped at 0.2 below and 0.28 above, the defaults of LossOptions.
    "grpo": Estimator(grpo_advantages, "behaviour"),
    "rloo": Estimator(rloo_advantages, "current"),
    "reinforce": Estimator(reinforce_advantages, "current"),
}


def estimator(name: str) -> Estimator:
    """The estimator of that name."""
    if name not in ESTIMATORS:
        raise ValueError(f"estimator={name!r} must be one of {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name]
