"""How a model grows: one protocol for the gated-MLP and the low-rank expert.

The kind of expert in a checkpoint's slots is stored in its ``slots.json``; ``growth_of`` returns
the matching growth. Both kinds are switched in the same way, with ``gated_mlp.smaller_self`` and
``gated_mlp.switched``.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from sleeprl.memory import checkpoint as ckpt
from sleeprl.memory import gated_mlp
from sleeprl.memory.expert_update import ExpertUpdate
from sleeprl.memory.slots import FILE, LOW_RANK, Slots
from sleeprl.memory.transfer import Merge, Step
from sleeprl.plugins import create


class Growth(Protocol):
    """A kind of expert, and the checkpoints that have room for it.

    Guarantees:

    * With a new expert, the training form's logits are bit-identical to those before.
    * Every written form computes what the training form computes, within the dtype's rounding.
    """

    def add_slots(
        self, source: Path, target: Path, pools: Sequence[int], width: int, dtype: str
    ) -> Slots:
        """Write a checkpoint with empty slots added; one that already has slots is copied.

        Args:
            source: Directory of a Hugging Face checkpoint.
            target: Directory to write.
            pools: Number of slots of each level, fastest first.
            width: Hidden units, or rank, of a slot.
            dtype: Name of the parameters' torch dtype.

        Returns:
            The slot layout of ``target``.
        """

    def load(
        self,
        directory: Path,
        slots: Slots,
        dtype: torch.dtype,
        teacher_only_slots: Collection[int] = (),
        wake_gradients: Mapping[str, Tensor] | None = None,
    ) -> nn.Module:
        """Load the training form, in eval mode on the CPU.

        Args:
            directory: A checkpoint with slots.
            slots: Its layout.
            dtype: Type of the parameters.
            teacher_only_slots: Slots that only the smaller self has (``Transfer.teacher_only``).
            wake_gradients: Accumulated gradients by checkpoint name. Only the larger self has them
                applied (the *compute* stage).
        """

    def grow(
        self,
        model: nn.Module,
        width: int,
        seed: int,
        slot: int | None = None,
        *,
        gated: bool = False,
    ) -> list[nn.Parameter]:
        """Add a new expert and freeze everything else.

        Args:
            model: A training form.
            width: Hidden units, or rank, of the expert.
            seed: Seed of the initial weights.
            slot: Slot that the expert is trained for.
            gated: Give the expert a gate of its own (``gated_mlp.Expert``).

        Returns:
            The new parameters.

        Raises:
            ValueError: ``gated`` is set and this kind of expert has no gate.
        """

    def fold(
        self, checkpoint: Path, slots: Slots, update: ExpertUpdate
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the dense MLP tensors after an update, for an engine, in whole layers."""

    def tensors(self, checkpoint: Path, slots: Slots) -> Iterator[tuple[str, Tensor]]:
        """Yield the dense MLP tensors of the checkpoint as it is. Sending them undoes ``fold``."""

    def write(self, checkpoint: Path, target: Path, slots: Slots, update: ExpertUpdate) -> Slots:
        """Write the checkpoint after an update and return its slot layout."""

    def merge(self, checkpoint: Path, target: Path, slots: Slots, slot: int) -> Slots:
        """Write a checkpoint with ``slot`` merged into the base and free; return its slot layout."""

    def export(self, checkpoint: Path, target: Path) -> None:
        """Write a plain checkpoint, without slots, that computes the same."""


class GatedMLPGrowth:
    """Growth by gated-MLP experts. The checkpoint is a plain, wider model at any time."""

    def add_slots(
        self, source: Path, target: Path, pools: Sequence[int], width: int, dtype: str
    ) -> Slots:
        return ckpt.widen(source, target, sum(pools), width, dtype, pools)

    load = staticmethod(gated_mlp.load_training_form)
    grow = staticmethod(gated_mlp.grow)
    fold = staticmethod(ckpt.fold)
    write = staticmethod(ckpt.write_grown)
    merge = staticmethod(ckpt.write_merged)

    def tensors(self, checkpoint: Path, slots: Slots) -> Iterator[tuple[str, Tensor]]:
        return ckpt.mlp_tensors(checkpoint)

    def export(self, checkpoint: Path, target: Path) -> None:
        shutil.copytree(
            checkpoint, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(FILE, ckpt.WAKE)
        )


def growth_named(name: str) -> Growth:
    """Create a growth from a short name (``gated_mlp``, ``low_rank``), entry point or dotted path."""
    growth: Growth = create(name, "growth", {})
    return growth


def growth_of(slots: Slots) -> Growth:
    """Return the growth that a checkpoint's slots are made for."""
    return growth_named(slots.growth)


def engine_extra_tensors(checkpoint: Path) -> Iterator[tuple[str, Tensor]] | None:
    """Return the tensors that an engine needs in addition to the checkpoint that it loaded.

    The slots of a low-rank model lie beside its weights, where an engine does not load them. They
    are sent as dense tensors.

    Args:
        checkpoint: Directory of the checkpoint.

    Returns:
        Names and tensors, or None if the checkpoint's own weights are complete.
    """
    slots = Slots.load(checkpoint)
    if slots is None or slots.growth != LOW_RANK or not slots.used:
        return None
    return growth_of(slots).tensors(checkpoint, slots)


def update(
    checkpoint: Path,
    target: Path,
    slots: Slots,
    step: Step,
    expert: Mapping[str, Tensor] | None = None,
    wake_gradients: Mapping[str, Tensor] | None = None,
) -> Slots:
    """Carry out one step of ``transfer.plan``: write the model after it into ``target``.

    Args:
        checkpoint: The model before the step.
        target: Directory to write.
        slots: Layout of the checkpoint.
        step: A ``Transfer`` or a ``Merge``.
        expert: The tensors trained for a ``Transfer``; a ``Merge`` needs none.
        wake_gradients: See ``ExpertUpdate``.

    Returns:
        The slot layout after the step.

    Raises:
        ValueError: A transfer has no expert.
    """
    growth = growth_of(slots)
    if isinstance(step, Merge):
        return growth.merge(checkpoint, target, slots, step.slot)
    if expert is None:
        raise ValueError(f"the transfer into slot {step.slot} needs the expert that was trained")
    change = ExpertUpdate(step.slot, expert, step.reset, wake_gradients)
    return growth.write(checkpoint, target, slots, change)
