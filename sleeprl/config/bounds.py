"""What a setting accepts, written beside the setting. Imports neither torch nor ray.

A field carries its bounds in its metadata: ``field(default=0.5, metadata=bounds(ge=0, le=1))``.
Validation and the reference of all settings both read them there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import Field, dataclass
from typing import Any

_BOUNDS, _PLUGIN = "bounds", "plugin"
LARGEST_COUNT = 2**31 - 1
"""The largest whole number of a setting without a bound of its own: what 32 bits hold."""
SMALLEST, LARGEST = 1e-12, 1e12
"""Numbers but 0 lie between these two: beyond them float32 loses them, or a sum of them."""


@dataclass(frozen=True)
class Bounds:
    """The values that one setting accepts."""

    gt: float | None = None
    """The value must be greater."""
    ge: float | None = None
    """The value must be at least this."""
    le: float | None = None
    """The value must be at most this."""
    choices: tuple[str, ...] = ()
    """The only values, if there are any."""
    whole_above_one: bool = False
    """Above 1 the value must be whole: shares of one device, or whole devices."""

    def find_violation(self, value: Any) -> str | None:
        """Say what is wrong with a value, as the end of a sentence; None for a good one."""
        if self.choices:
            return None if value in self.choices else f"must be one of {', '.join(self.choices)}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if not math.isfinite(value):
            return "must be a finite number"
        if self.gt is not None and value <= self.gt:
            return f"must be greater than {self.gt:g}"
        if self.ge is not None and value < self.ge:
            return f"must be at least {self.ge:g}"
        if value > (highest := self._highest(value)):
            return f"must be at most {_number(highest)}"
        if 0 < abs(value) < SMALLEST:
            return f"is too small to make a difference; the smallest number above 0 is {SMALLEST:g}"
        if self.whole_above_one and value > 1 and value != int(value):
            return "must be a share of one, such as 0.5, or whole ones"
        return None

    def describe(self) -> str:
        """Name the bounds in a few words, such as ``0 to 1`` or ``> 0``; empty without any."""
        if self.choices:
            return ", ".join(self.choices)
        if self.ge is not None and self.le is not None:
            return f"{_number(self.ge)} to {_number(self.le)}"
        signs = ((">", self.gt), (">=", self.ge), ("<=", self.le))
        named = ", ".join(f"{sign} {_number(bound)}" for sign, bound in signs if bound is not None)
        return f"{named}, whole above 1" if self.whole_above_one else named

    def _highest(self, value: float) -> float:
        if self.le is not None:
            return self.le
        return LARGEST_COUNT if isinstance(value, int) else LARGEST


def _number(bound: float) -> str:
    """Write a bound; whole numbers in full."""
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def bounds(
    *,
    gt: float | None = None,
    ge: float | None = None,
    le: float | None = None,
    whole_above_one: bool = False,
) -> dict[str, Any]:
    """Make the metadata of a field that holds a number."""
    return {_BOUNDS: Bounds(gt=gt, ge=ge, le=le, whole_above_one=whole_above_one)}


def choices(names: Sequence[str]) -> dict[str, Any]:
    """Make the metadata of a field that holds one of a few names."""
    return {_BOUNDS: Bounds(choices=tuple(names))}


def plugin(kind: str) -> dict[str, Any]:
    """Make the metadata of a field that names a plug-in of a kind (``sleeprl.plugins``)."""
    return {_PLUGIN: kind}


def bounds_of(entry: Field[Any]) -> Bounds:
    """Get the bounds of a dataclass field."""
    found: Bounds = entry.metadata.get(_BOUNDS, Bounds())
    return found


def plugin_kind_of(entry: Field[Any]) -> str | None:
    """Get the kind of plug-in that a dataclass field names, if it names one."""
    kind: str | None = entry.metadata.get(_PLUGIN)
    return kind
