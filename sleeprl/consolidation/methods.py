"""The loss weights of each method, by stream and step."""

from __future__ import annotations

from sleeprl.config.methods import NEW, PASSAGE, REPLAY, STUDENT, Method
from sleeprl.config.schema import ConsolidationConfig
from sleeprl.consolidation.objective import seeding_weights
from sleeprl.losses.types import LossWeights


def seeding_parts(config: ConsolidationConfig, step: int) -> dict[str, LossWeights]:
    """Return J_KS at a step as loss weights of the teacher's texts and of the student's rollouts.

    Replay gets the weight that ``replay_ratio`` gives it in the data. Both streams are means, so
    without this factor replay would count as much as the new texts.

    Args:
        config: The night's settings.
        step: Number of the optimizer step, from 0.
    """
    weights = seeding_weights(
        step,
        alpha=config.distillation,
        on_policy=config.on_policy,
        on_policy_warmup=config.on_policy_warmup,
        seed_steps=config.seed_steps,
        ce=config.ce,
    )
    new, ratio = weights.texts, config.replay_ratio
    parts = {
        NEW: new,
        REPLAY: LossWeights(
            kl=new.kl * ratio, ce=new.ce * ratio, activity_penalty=config.expert_gate
        ),
    }
    if config.rollout_prompts:
        parts[STUDENT] = weights.rollouts
    return parts


def loss_weights(method: Method, config: ConsolidationConfig, step: int) -> dict[str, LossWeights]:
    """Return the loss weights of every stream that a method trains on, at a step.

    Args:
        method: A row of ``METHODS``.
        config: The night's settings as ``method.objective`` changes them.
        step: Number of the optimizer step, from 0.
    """
    weights = {**seeding_parts(config, step), PASSAGE: LossWeights(ce=1.0)}
    return {name: weights[name] for name in (*method.texts, STUDENT) if name in weights}
