"""How a model grows: one protocol for the gated-MLP and the low-rank expert.

Which of them a checkpoint's slots hold is in its ``slots.json``; ``growth_of`` gives it.
Switching is the same for both: ``experts.smaller_self`` and ``experts.switched``.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from sleeprl.memory import checkpoint as ckpt
from sleeprl.memory import gated_mlp as experts
from sleeprl.memory.slots import FILE, LOW_RANK, Slots
from sleeprl.memory.transfer import Merge, Step
from sleeprl.plugins import create


class Growth(Protocol):
    """A kind of expert, and the checkpoints that have room for it.

    Function preserving: at birth the training form's logits are the same to the bit;
    every written form computes what the training form did, within the dtype's rounding.
    An expert is a mapping from checkpoint names to its tensors (``checkpoint.expert_tensors``
    of a training form). wake, where it is taken: gradients accumulated for the sender's
    base (``wake_learning``), by checkpoint name; the update subtracts them.
    """

    def prepare(
        self, source: Path, target: Path, pools: Sequence[int], width: int, dtype: str
    ) -> Slots:
        """Write ``source`` with empty slots of ``width``: ``pools[l]`` of them for level l + 1.

        A checkpoint that already has slots is copied with the slots it has.
        """

    def load(
        self,
        directory: Path,
        slots: Slots,
        dtype: torch.dtype,
        held: Collection[int] = (),
        wake: Mapping[str, Tensor] | None = None,
    ) -> nn.Module:
        """The training form. held: slots that only the smaller self has (``Transfer.held``)."""

    def grow(
        self,
        model: nn.Module,
        width: int,
        seed: int,
        slot: int | None = None,
        *,
        routed: bool = False,
    ) -> list[nn.Parameter]:
        """A newborn expert, the only thing that gets gradients; returns its parameters.

        routed: with a gate of its own (``experts.Expert``), where the kind has one.
        """

    def fold(
        self,
        checkpoint: Path,
        slots: Slots,
        slot: int,
        expert: Mapping[str, Tensor],
        *,
        reset: Collection[int] = (),
        wake: Mapping[str, Tensor] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Dense MLP tensors of the larger self, for an engine; whole layers."""

    def tensors(self, checkpoint: Path, slots: Slots) -> Iterator[tuple[str, Tensor]]:
        """Dense MLP tensors of the checkpoint as it is: what takes ``fold`` back."""

    def write(
        self,
        checkpoint: Path,
        target: Path,
        slots: Slots,
        slot: int,
        expert: Mapping[str, Tensor],
        *,
        reset: Collection[int] = (),
        wake: Mapping[str, Tensor] | None = None,
    ) -> Slots:
        """The *update* stage: apply ``wake``, empty ``reset``, fill ``slot``; a new checkpoint."""

    def merge(self, checkpoint: Path, target: Path, slots: Slots, slot: int) -> Slots:
        """A checkpoint in which ``slot`` is part of the base, and free."""

    def export(self, checkpoint: Path, target: Path) -> None:
        """A plain checkpoint, without slots, that computes the same."""


class GatedMLPGrowth:
    """Growth by gated-MLP experts: the checkpoint is a plain, wider model at any time."""

    def prepare(
        self, source: Path, target: Path, pools: Sequence[int], width: int, dtype: str
    ) -> Slots:
        return ckpt.widen(source, target, sum(pools), width, dtype, pools)

    load = staticmethod(experts.load_training_form)
    grow = staticmethod(experts.grow)
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
    """By short name (``gated_mlp``, ``low_rank``), entry point or dotted path."""
    growth: Growth = create(name, "growth", {})
    return growth


def growth_of(slots: Slots) -> Growth:
    """The growth that a checkpoint's slots are for."""
    return growth_named(slots.growth)


def engine_extra_tensors(checkpoint: Path) -> Iterator[tuple[str, Tensor]] | None:
    """What an engine that has loaded a checkpoint must be sent still, if anything: of a low-rank model
    the slots, which lie beside its weights, as the dense tensors that they make."""
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
    wake: Mapping[str, Tensor] | None = None,
) -> Slots:
    """Carry out one step of ``transfer.plan``: write the model after it into ``target``.

    expert: what was trained for a ``Transfer``; a ``Merge`` needs none.
    """
    growth = growth_of(slots)
    if isinstance(step, Merge):
        return growth.merge(checkpoint, target, slots, step.slot)
    if expert is None:
        raise ValueError(f"the transfer into slot {step.slot} needs the expert that was trained")
    return growth.write(checkpoint, target, slots, step.slot, expert, reset=step.reset, wake=wake)
