"""Which slots teach, which learn and which are emptied when a level sleeps. Pure.

Mode A brings the context into a slot of level 1: the teacher has the context in its
prompt. Mode B brings all slots of a level into one new slot of the next slower
level: the teacher has them on, the student has them reset (method.md 2.3, 2.6).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from sleeprl.memory.levels import CONTEXT, Due
from sleeprl.memory.slots import PoolFull, Slots


class WhenFull(StrEnum):
    """What makes room when the slowest level is full; the paper leaves it open (method.md 6.9)."""

    DISTIL = "distil"
    """All its slots into one, by another consolidation."""
    MERGE = "merge"
    """The oldest slot becomes part of the base."""
    STOP = "stop"
    """Nothing: PoolFull is raised."""


@dataclass(frozen=True)
class Transfer:
    """One consolidation, sender to receiver."""

    sender: int
    """A level, or ``CONTEXT``."""
    receiver: int
    """The level that gets the new slot."""
    teacher_on: tuple[int, ...]
    """Slots of the smaller self."""
    student_on: tuple[int, ...]
    """Slots of the larger self while it learns; ``slot`` is one of them, with its new content."""
    slot: int
    """The one that is trained; nothing else changes meanwhile."""
    reset: tuple[int, ...]
    """Slots that are emptied afterwards: ``teacher_only``, or none where a level keeps what it
    hands on. A level that is distilled into itself has ``slot`` among them: it is emptied first,
    then takes the new expert."""

    @property
    def teacher_has_context(self) -> bool:
        """Mode A. In Mode B both selves get the same prompt."""
        return self.sender == CONTEXT

    @property
    def teacher_only(self) -> tuple[int, ...]:
        """The slots whose content only the teacher has: those of the sender."""
        beside = set(self.student_on) - {self.slot}
        return tuple(slot for slot in self.teacher_on if slot not in beside)

    def after(self, slots: Slots) -> Slots:
        return slots.freed(self.reset).filled(self.slot)


@dataclass(frozen=True)
class Merge:
    """A slot becomes part of the base. Exact, so nothing is trained."""

    slot: int

    def after(self, slots: Slots) -> Slots:
        return slots.merged(self.slot)


Step = Transfer | Merge


def to_dict(step: Step) -> dict[str, Any]:
    """As JSON: a transfer has a ``sender``, a merge has none."""
    return asdict(step)


def from_dict(values: Mapping[str, Any]) -> Step:
    """The inverse of ``to_dict``."""
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
    """All steps of one night, in order; the last of them is a transfer.

    Room first, if the slowest level is full as the night begins; then the context into
    level 1; then every sender that is due at the boundaries that were passed, fastest
    first. The slowest level's own boundary asks for nothing but room, which the next
    night makes. Raises PoolFull as ``plan`` does.
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
    """What has to be done when ``sender`` is due, in order; each step is one generation.

    Empty when there is nothing to hand on: an empty sender, or the slowest level
    while it still has room. Without ``reset`` a level keeps what it hands on (the
    paper's ablation); making room in the slowest level empties slots all the same.
    Raises PoolFull when the receiver is full and may not, or cannot, be emptied.
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
    """How the full slowest level gets a free slot; empty if it does not."""
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
