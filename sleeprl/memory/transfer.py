"""Which slots teach, which learn and which are reset when a level consolidates. Pure.

Mode A consolidates the context into a slot of level 1: the teacher has the context in its prompt.
Mode B consolidates all slots of a level into one new slot of the next slower level: the teacher has
them on, the student has them reset.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from sleeprl.memory.levels import CONTEXT, Due
from sleeprl.memory.slots import PoolFull, Slots


class WhenFull(StrEnum):
    """How the slowest level gets a free slot when it is full; the paper leaves it open."""

    DISTIL = "distil"
    """Consolidate all slots of the level into one."""
    MERGE = "merge"
    """Merge the oldest slot into the base."""
    STOP = "stop"
    """Make no room; PoolFull is raised."""


@dataclass(frozen=True)
class Transfer:
    """One consolidation, from a sender to a receiver."""

    sender: int
    """A level, or ``CONTEXT``."""
    receiver: int
    """Level of the new slot."""
    teacher_on: tuple[int, ...]
    """Slots of the smaller self."""
    student_on: tuple[int, ...]
    """Slots of the larger self during training, including ``slot`` with the new expert."""
    slot: int
    """The slot that is trained; no other changes during training."""
    reset: tuple[int, ...]
    """Slots to reset afterwards: ``teacher_only``, or none if the sender keeps its slots. If a
    level is distilled into itself, ``slot`` is among them: it is reset first and then takes the new
    expert."""

    @property
    def teacher_has_context(self) -> bool:
        """Whether this is Mode A. In Mode B both selves get the same prompt."""
        return self.sender == CONTEXT

    @property
    def teacher_only(self) -> tuple[int, ...]:
        """Slots of the sender, whose content only the teacher has."""
        beside = set(self.student_on) - {self.slot}
        return tuple(slot for slot in self.teacher_on if slot not in beside)

    def after(self, slots: Slots) -> Slots:
        """Return the slot layout after the transfer."""
        return slots.freed(self.reset).filled(self.slot)


@dataclass(frozen=True)
class Merge:
    """A merge of one slot into the base. It is exact, so nothing is trained."""

    slot: int
    """The slot to merge."""

    def after(self, slots: Slots) -> Slots:
        """Return the slot layout after the merge."""
        return slots.merged(self.slot)


Step = Transfer | Merge


def to_dict(step: Step) -> dict[str, Any]:
    """Convert a step to JSON values. A transfer has a ``sender``, a merge has none."""
    return asdict(step)


def from_dict(values: Mapping[str, Any]) -> Step:
    """Convert JSON values to a step (inverse of ``to_dict``)."""
    if "sender" not in values:
        return Merge(**values)
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Transfer(**plain)


def plan_night(
    slots: Slots,
    boundaries: Iterable[Due],
    when_full: WhenFull | str = WhenFull.DISTIL,
    reset: bool = True,
) -> tuple[Step, ...]:
    """Plan all steps of one night, in order; the last step is a transfer.

    First comes room, if the slowest level is full at the start of the night. Then the context is
    consolidated into level 1. Then every sender that is due at a passed boundary hands its slots
    on, fastest first. The slowest level's own boundary requires only room, which the next night
    makes.

    Args:
        slots: Layout at the start of the night.
        boundaries: Boundaries of the clock that have been passed.
        when_full: How the slowest level gets a free slot.
        reset: Reset the slots that a level hands on.

    Raises:
        PoolFull: As for ``plan``.
    """
    senders = [sender for due in boundaries for sender in due.senders]
    handing_on = [sender for sender in senders if CONTEXT < sender < slots.levels]
    steps: list[Step] = []
    for sender in (slots.levels, CONTEXT, *handing_on):
        made = plan(slots, sender, when_full, reset)
        for step in made:
            slots = step.after(slots)
        steps.extend(made)
    return tuple(steps)


def plan(
    slots: Slots,
    sender: int,
    when_full: WhenFull | str = WhenFull.DISTIL,
    reset: bool = True,
) -> tuple[Step, ...]:
    """Plan the steps for one due sender, in order; each step is one generation.

    There are no steps if there is nothing to hand on: the sender is empty, or it is the slowest
    level and has room left.

    Args:
        slots: Current layout.
        sender: A level, or ``CONTEXT``.
        when_full: How the slowest level gets a free slot.
        reset: Reset the slots that the sender hands on. False is the paper's ablation; making room
            in the slowest level resets slots in either case.

    Raises:
        PoolFull: The receiver is full and cannot, or must not, be emptied.
    """
    slowest = slots.levels
    full = len(slots.used_in(slowest)) == slots.pools[-1]
    room = _room(slots, WhenFull(when_full)) if full else ()
    if sender == slowest:
        return room
    if sender != CONTEXT and not slots.used_in(sender):
        return ()
    receiver = sender + 1
    if receiver != slowest or not full:
        return (_transfer(slots, sender, receiver, slots.next_free(receiver), reset),)
    if not room:
        raise PoolFull(
            f"all {slots.pools[-1]} slots of level {slowest}, the slowest, are in use and "
            f"when_full={str(when_full)!r} makes no room; choose 'distil' (which needs two slots or "
            "more) or 'merge', or start from a plain model with more slots (memory.levels)"
        )
    (step,) = room
    slots = step.after(slots)
    return (step, _transfer(slots, sender, receiver, slots.next_free(receiver), reset))


def _room(slots: Slots, when_full: WhenFull) -> tuple[Step, ...]:
    """Return the step that frees a slot of the full slowest level; empty if none does."""
    used = slots.used_in(slots.levels)
    if when_full == WhenFull.MERGE and used:
        return (Merge(used[0]),)
    if when_full == WhenFull.DISTIL and len(used) > 1:
        return (_transfer(slots, slots.levels, slots.levels, min(used)),)
    return ()


def _transfer(slots: Slots, sender: int, receiver: int, slot: int, reset: bool = True) -> Transfer:
    teacher_only = () if sender == CONTEXT else slots.used_in(sender)
    beside = tuple(number for number in slots.used if number not in teacher_only)
    emptied = teacher_only if reset else ()
    return Transfer(sender, receiver, slots.used, (*beside, slot), slot, emptied)
