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

NEW, REPLAY, STUDENT, PASSAGE = "new", "replay", "student", "passage"


@dataclass(frozen=True)
class Method:
    """One way to get a day into the weights."""

    title: str
    """What a reader sees."""
    texts: tuple[str, ...] = (NEW, REPLAY)
    """The streams that a step reads: ``new`` and ``replay`` (self-study), ``passage`` (documents)."""
    rollouts: bool = True
    """Whether the student's own texts are trained on. Without ``texts`` there is nothing else."""
    grows: bool = False
    """Whether one new slot is trained and all else is frozen; otherwise every parameter is trained."""
    anchored: bool = False
    """Whether elastic weight consolidation holds the model near the smaller self."""
    sets: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the night's ``consolidation`` settings."""

    def objective(self, config: ConsolidationConfig) -> ConsolidationConfig:
        """Apply this method to the night's settings."""
        config = replace(config, **self.sets)
        if not self.grows:
            config = replace(config, expert_gate=0.0)
        if not self.rollouts:
            return replace(config, rollout_prompts=0)
        if not self.texts:  # then a step's batch is made of roll-outs
            rows = config.batch_size * config.rollout_every
            return replace(config, rollout_prompts=math.ceil(rows / config.group_size))
        return config

    def learning_rate(
        self, name: str, seeding: ConsolidationConfig, fixed: FixedCapacityConfig
    ) -> float:
        """Get the learning rate of the method ``name``: its own, or that of its kind."""
        kind = seeding.learning_rate if self.grows else fixed.learning_rate
        return fixed.learning_rates.get(name, kind)


# The divergence that ``seed_steps`` begins with is Sleep's.
_CROSS_ENTROPY = {"distillation": 0.0, "ce": 1.0, "seed_steps": 0}
_BARE_QUESTION = {"prefix_min": 0.0, "prefix_max": 0.0}

METHODS: dict[str, Method] = {
    # Sleep, and what is left of it without one of its parts (the paper's Table 1).
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
"""What ``baselines`` may name, and ``seeding``, the night's own."""
