"""Memory levels, and the clock that determines when each of them consolidates. Pure.

Levels are counted from 1, the fastest. The context, which feeds level 1, is sender ``CONTEXT`` and
has no slots. At every multiple of its period a level hands its slots on to the next slower level
(paper, section on sleep).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

CONTEXT = 0
UNITS = ("tokens", "optimizer_steps", "episodes", "nights")


@dataclass(frozen=True)
class Level:
    """One level of memory."""

    period: int
    """C^(l), in units of the clock."""
    slots: int
    """Number of experts that the level's pool has room for."""


class Due(NamedTuple):
    """A boundary that the clock has reached."""

    at: int
    """Time of the boundary, in units of the clock."""
    senders: tuple[int, ...]
    """Levels that consolidate at the boundary, fastest first; ``CONTEXT`` may be the first."""


class Clock:
    """A counter of experience that fires at each multiple of each level's period."""

    def __init__(
        self, levels: Sequence[Level], unit: str = "nights", context: int | None = None
    ) -> None:
        """Start the clock at 0.

        Args:
            levels: The levels, fastest first.
            unit: What is counted, one of ``UNITS``. The caller of ``advance`` does the counting.
            context: Period of consolidating the context into level 1. None leaves that to the
                caller (one sleep per task, for example).

        Raises:
            ValueError: A period does not divide the next slower one, or a pool is too small for the
                experts that arrive between two sleeps of its own level.
        """
        if unit not in UNITS:
            raise ValueError(f"unit={unit!r} is unknown; choose one of {', '.join(UNITS)}")
        if not levels:
            raise ValueError("levels is empty; give at least one level")
        self.levels = tuple(levels)
        self.unit = unit
        self.now = 0
        self._periods = {n: level.period for n, level in enumerate(self.levels, start=1)}
        if context is not None:
            self._periods = {CONTEXT: context, **self._periods}
        self._check()

    def _check(self) -> None:
        for sender, period in self._periods.items():
            if period < 1:
                raise ValueError(f"{_name(sender)} has period={period}; it must be at least 1")
        for number, level in enumerate(self.levels, start=1):
            least = 1
            if number - 1 in self._periods:
                faster = self._periods[number - 1]
                if level.period % faster:
                    raise ValueError(
                        f"the period {level.period} of {_name(number)} is no multiple of the period "
                        f"{faster} of {_name(number - 1)}; periods must divide each other"
                    )
                least = level.period // faster
            if level.slots < least:
                raise ValueError(
                    f"{_name(number)} has slots={level.slots}, but up to {least} experts arrive in "
                    f"its period of {level.period} {self.unit}; give it at least {least} slots"
                )

    @property
    def pools(self) -> tuple[int, ...]:
        """Number of slots of each level, fastest first, as a checkpoint is widened by them."""
        return tuple(level.slots for level in self.levels)

    def advance(self, amount: int) -> list[Due]:
        """Let ``amount`` units pass and return every boundary reached or crossed, in order.

        The slowest level's boundaries are included, although that level has no receiver: see
        ``transfer.plan``.

        Raises:
            ValueError: ``amount`` is negative.
        """
        if amount < 0:
            raise ValueError(f"amount={amount}; time does not run backwards")
        fastest = next(iter(self._periods.values()))
        before, self.now = self.now, self.now + amount
        first = (before // fastest + 1) * fastest
        return [
            Due(at, tuple(sender for sender, period in self._periods.items() if at % period == 0))
            for at in range(first, self.now + 1, fastest)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the unit and the current time, as JSON values."""
        return {"unit": self.unit, "now": self.now}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved ``state_dict``.

        Raises:
            ValueError: The saved clock counts another unit.
        """
        if state["unit"] != self.unit:
            raise ValueError(
                f"the saved clock counts unit={state['unit']!r}, this one {self.unit!r}; "
                "set the unit back or start a new clock"
            )
        self.now = int(state["now"])


def _name(sender: int) -> str:
    return "the context" if sender == CONTEXT else f"level {sender}"
