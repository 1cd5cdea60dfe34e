"""Define what a trainer needs to know before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

FINAL_RATE = 0.05
"""Share of the learning rate that is left at the end of its cosine."""


@dataclass(frozen=True)
class TrainerOptions:
    """Describe one trainer; plain enough to travel to its process."""

    checkpoint: str
    """Directory of a checkpoint with slots (``Growth.add_slots`` writes one)."""
    slot: int | None
    """Slot whose expert is trained. None trains every parameter, as baselines and plain RL do."""
    dtype: str
    """torch's name of the parameters' type, such as ``float32`` or ``bfloat16``."""
    seed: int
    """Seed of a new expert's first weights and of what is drawn for the Fisher information."""
    learning_rate: float
    """Highest learning rate, after ``warmup``."""
    total_steps: int
    """Optimiser steps over which the learning rate falls to ``FINAL_RATE`` of itself."""
    warmup: int = 0
    """Steps over which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient."""
    threads: int = 1
    """CPU threads of this process."""
    gpu: bool = False
    """Whether the model is on this process's CUDA device."""
    micro_batch_tokens: int = 8192
    """Most padded tokens in one forward pass."""
    teacher_only_slots: tuple[int, ...] = ()
    """Slots that only the smaller self has while it teaches (``Transfer.teacher_only``)."""
    keep_sender_slots: bool = False
    """Whether ``Trainer.finalise`` turns those slots on again (``memory.reset`` is off)."""
    gated_expert: bool = False
    """Whether the new expert has a gate of its own, which ``LossWeights.activity_penalty`` closes."""
    wake_gradients_path: str = ""
    """File of the gradients accumulated by day, which only the larger self has applied."""
    offload: str = "none"
    """What moves to the host's memory, see ``resources.offload``. Without a GPU nothing moves."""
    critic: bool = False
    """Whether a value head stands beside the language head (``Algorithm.needs_critic``)."""
    colocated: bool = False
    """Whether engines work on the same device between steps; they sleep during one."""

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0: a warm-up, then a cosine."""
        if step < self.warmup:
            scale = (step + 1) / self.warmup
        else:
            progress = (step - self.warmup) / max(1, self.total_steps - self.warmup)
            cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
            scale = FINAL_RATE + (1 - FINAL_RATE) * cosine
        return self.learning_rate * scale
