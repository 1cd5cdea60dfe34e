"""The change that a trained expert makes to a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sleeprl.memory.slots import Slots


@dataclass(frozen=True)
class ExpertUpdate:
    """One expert for one slot, with the resets and gradients of the *update* stage.

    Wake gradients are applied first, then slots are reset, then the expert is written.
    """

    slot: int
    """Slot that the expert is written to."""
    expert: Mapping[str, Tensor]
    """The expert's tensors under checkpoint names (``checkpoint.expert_tensors`` of a training
    form)."""
    reset: tuple[int, ...] = ()
    """Slots to empty; ``slot`` may be one of them."""
    wake_gradients: Mapping[str, Tensor] | None = None
    """Gradients accumulated for the sender's base, by checkpoint name (``wake_learning``)."""

    def layout_after(self, slots: Slots) -> Slots:
        """Return the slot layout after the update."""
        return slots.freed(self.reset).filled(self.slot)
