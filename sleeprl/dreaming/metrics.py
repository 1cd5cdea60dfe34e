"""The metrics of an update: rewards, staleness, and agreement of engines and trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sleeprl.data.trajectory import Trajectory
from sleeprl.dreaming.types import Outcome


def task_outcomes(dreams: Sequence[Trajectory]) -> list[Outcome]:
    """Collect the outcome of each task, over all its dreams in the batch."""
    outcomes = []
    for task in dict.fromkeys(d.task_id for d in dreams):
        group = [d for d in dreams if d.task_id == task]
        gaps = [_gap(d) for d in group]
        rewards = [d.reward for d in group if d.reward is not None]
        outcomes.append(Outcome(task, rewards, sum(gaps) / len(gaps)))
    return outcomes


def reward_metrics(dreams: Sequence[Trajectory]) -> dict[str, float]:
    """Compute the rewards and lengths of an update's dreams.

    Args:
        dreams: All dreams, including those that were set aside; without them the rewards would be
            biased upwards.
    """
    scored = [d.reward for d in dreams if d.reward is not None]
    return {
        # No reward is not a reward of 0.
        "reward": sum(scored) / len(scored) if scored else math.nan,
        "reward_positive": sum(r > 0 for r in scored) / len(scored) if scored else math.nan,
        "unscored": float(len(dreams) - len(scored)),
        "gap": sum(_gap(d) for d in dreams) / len(dreams),
        "response_tokens": sum(len(d.response_ids) for d in dreams) / len(dreams),
    }


def describe_unscored(dreams: Sequence[Trajectory]) -> str:
    """Return why the first dream has no reward, if none of the dreams has one; else an empty text."""
    if not dreams or any(dream.reward is not None for dream in dreams):
        return ""
    return dreams[0].unscored or "the dreams have no rewards"


def staleness_metrics(
    dreams: Sequence[Trajectory], stale: Sequence[int], version: int
) -> dict[str, Any]:
    """Compute by how many versions the policy of the learned tokens trails the trainer's.

    Args:
        dreams: The dreams that the update learns from.
        stale: Number of leading tokens of each dream that are too old to learn from.
        version: Policy version that the update produces.
    """
    ages = [version - v for d, n in zip(dreams, stale, strict=True) for v in d.versions[n:]]
    return {
        "tokens_too_old": float(sum(stale)),
        "staleness": sum(ages) / max(1, len(ages)),
        "staleness_max": float(max(ages, default=0)),
        "staleness_tokens": {str(age): ages.count(age) for age in sorted(set(ages))},
    }


def pop_agreement(metrics: dict[str, Any], part: str) -> dict[str, dict[str, float]]:
    """Remove the log-probability differences of engines and trainer from the metrics of a step.

    At age 0 and temperature 1 they are the numerical mismatch of the two sides. A dream that was
    continued after an update counts with the age of its first token, because its KV cache is as
    old.

    Args:
        metrics: Metrics of ``Trainer.step``; the keys that are read are removed.
        part: The part of the loss that has the dreams.

    Returns:
        The mean and the largest difference of the log-probabilities (nats), by the age of the
        weights that began the dream.
    """
    keys = [key.split("/") for key in metrics if key.startswith(f"{part}/age_")]
    ages = sorted({int(key[1].removeprefix("age_")) for key in keys})
    means: dict[str, float] = {}
    largest: dict[str, float] = {}
    for age in ages:
        share, apart, most = (
            metrics.pop(f"{part}/age_{age}/{what}") for what in ("share", "apart", "max")
        )
        means[str(age)], largest[str(age)] = apart / share, most
    return {"logprob_difference": means, "logprob_difference_max": largest}


def _gap(dream: Trajectory) -> float:
    assert dream.gap is not None, f"{dream.uid} was not scored"
    return dream.gap
