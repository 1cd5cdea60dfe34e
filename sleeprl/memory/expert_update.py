"""What a trained expert changes in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sleeprl.memory.slots import Slots


@dataclass(frozen=True)
class ExpertUpdate:
    """One expert into one slot, and what goes with it: the *update* stage (method.md 2.3).

    The gradients are applied first, then slots are emptied, then the expert is written.
    """

    slot: int
    """Where the expert goes."""
    expert: Mapping[str, Tensor]
    """Its tensors under checkpoint names (``checkpoint.expert_tensors`` of a training form)."""
    reset: tuple[int, ...] = ()
    """Slots that are emptied; ``slot`` may be one of them."""
    wake_gradients: Mapping[str, Tensor] | None = None
    """Gradients accumulated for the sender's base, by checkpoint name (``wake_learning``)."""

    def layout_after(self, slots: Slots) -> Slots:
        """Return the layout that the update leaves."""
        return slots.freed(self.reset).filled(self.slot)
