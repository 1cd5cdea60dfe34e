"""Sleep, its ablations and the baselines: each a row of one table, none a loop of its own.

All of them learn from the same day, self-study and engines, run in the same job, stop at
the same number of trained tokens and are measured by the same code. What sets one apart
from another is which texts it reads, whether the student's roll-outs are among them,
what the objective weighs, whether the model grows, and whether a penalty holds it back.
The upper bound, the text in the prompt, trains nothing and is ``before_with_context``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sleeprl.config.schema import ConsolidationConfig, FixedCapacityConfig
from sleeprl.consolidation.objective import seeding_weights
from sleeprl.losses.combined import LossWeights

NEW, REPLAY, STUDENT, PASSAGE = "new", "replay", "student", "passage"


def seeding_parts(config: ConsolidationConfig, step: int) -> dict[str, LossWeights]:
    """J_KS at a step, as stream weights of what the teacher wrote and of the student's roll-outs.

    Replay has the weight that ``replay_ratio`` gives it in the data; both streams
    are means, so without this it would count as much as the new.
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
    quiet = config.expert_gate
    parts = {NEW: new, REPLAY: LossWeights(kl=new.kl * ratio, ce=new.ce * ratio, quiet=quiet)}
    if config.rollout_prompts:
        parts[STUDENT] = weights.rollouts
    return parts


@dataclass(frozen=True)
class Method:
    """One way to get a day into the weights.

    title: what a reader sees. texts: the streams a step reads, of ``new`` and ``replay``
        (self-study) and ``passage`` (the documents themselves).
    rollouts: whether the student's own texts are learnt from; they are all there is
        where ``texts`` is empty.
    grows: one new slot is trained and all else is frozen; otherwise every parameter is.
    anchored: elastic weight consolidation around the smaller self.
    sets: what is different in the night's ``consolidation`` settings.
    """

    title: str
    texts: tuple[str, ...] = (NEW, REPLAY)
    rollouts: bool = True
    grows: bool = False
    anchored: bool = False
    sets: Mapping[str, Any] = field(default_factory=dict)

    def objective(self, config: ConsolidationConfig) -> ConsolidationConfig:
        """The night's settings as this method has them."""
        config = replace(config, **self.sets)
        if not self.grows:
            config = replace(config, expert_gate=0.0)
        if not self.rollouts:
            return replace(config, rollout_prompts=0)
        if not self.texts:  # then a step's batch is made of roll-outs
            rows = config.batch_size * config.rollout_every
            return replace(config, rollout_prompts=math.ceil(rows / config.group_size))
        return config

    def parts(self, config: ConsolidationConfig, step: int) -> dict[str, LossWeights]:
        """Stream weights of what is read at a step. config: what ``objective`` gave."""
        weights = {**seeding_parts(config, step), PASSAGE: LossWeights(ce=1.0)}
        return {name: weights[name] for name in (*self.texts, STUDENT) if name in weights}

    def learning_rate(
        self, name: str, seeding: ConsolidationConfig, fixed: FixedCapacityConfig
    ) -> float:
        """What the night says for the method ``name``, or for its kind."""
        kind = seeding.learning_rate if self.grows else fixed.learning_rate
        return fixed.learning_rates.get(name, kind)


# The divergence that ``seed_steps`` begins with is Sleep's.
_CROSS_ENTROPY = {"distillation": 0.0, "ce": 1.0, "seed_steps": 0}
_BARE_QUESTION = {"prefix_min": 0.0, "prefix_max": 0.0}

METHODS: dict[str, Method] = {
    # Sleep, and what is left of it without one of its parts (method 4.2).
    "seeding": Method("Sleep without dreams", grows=True),
    "no_imitation": Method("Sleep, no imitation", grows=True, sets={"distillation": 1.0}),
    "no_semantic": Method("Sleep, no semantics", grows=True, sets={"semantic": 0.0}),
    "no_replay": Method("Sleep, no replay", grows=True, texts=(NEW,)),
    "no_growth": Method("Sleep, no growth"),
    # Fixed capacity: every parameter is trained.
    "fine_tuning": Method("Plain fine-tuning", texts=(PASSAGE,), rollouts=False),
    "fine_tuning_pairs": Method(
        "Fine-tuning, self-study", texts=(NEW,), rollouts=False, sets=_CROSS_ENTROPY
    ),
    "ewc": Method(
        "EWC, self-study", texts=(NEW,), rollouts=False, anchored=True, sets=_CROSS_ENTROPY
    ),
    "replay": Method("Self-study and replay", rollouts=False, sets=_CROSS_ENTROPY),
    # SDFT (2601.19897) and OPSD (2601.18734): the teacher reads, the student writes.
    "self_distillation": Method(
        "Self-distillation",
        texts=(),
        sets={**_BARE_QUESTION, "distillation": 1.0, "on_policy": 1.0, "group_size": 1},
    ),
    "grpo": Method("GRPO", texts=(), sets={**_BARE_QUESTION, "distillation": 0.0, "seed_steps": 0}),
}
