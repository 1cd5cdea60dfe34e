"""The pool of expert slots of a checkpoint: which columns of its MLPs hold what. Pure.

A gated MLP with an expert of width w beside it *is* a gated MLP whose
intermediate size is larger by w. So a checkpoint that can grow is an ordinary
one whose MLPs were widened once by ``count * width`` zero columns; a slot is a
range of those columns, and growing is filling the next free one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

FILE = "slots.json"


class PoolFull(RuntimeError):
    """Every slot holds something; the model must be widened before it can grow again."""


@dataclass(frozen=True)
class Slots:
    """Layout of one checkpoint's pool.

    base_width: intermediate size before any slot existed.
    width: hidden units per layer and slot.
    count: slots allocated.
    used: slots that hold an expert, in the order in which they were filled.
    """

    base_width: int
    width: int
    count: int
    used: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if any(not 0 <= slot < self.count for slot in self.used) or len(set(self.used)) < len(
            self.used
        ):
            raise ValueError(
                f"slots used={list(self.used)} must be distinct and below count={self.count}"
            )

    @property
    def total_width(self) -> int:
        return self.base_width + self.count * self.width

    def columns(self, slot: int) -> slice:
        """The intermediate units of one slot."""
        start = self.base_width + slot * self.width
        return slice(start, start + self.width)

    def next_free(self) -> int:
        for slot in range(self.count):
            if slot not in self.used:
                return slot
        raise PoolFull(
            f"all {self.count} slots are in use; start from a model with more "
            "(model.slots) or roll back to an earlier generation"
        )

    def occupied_columns(self, slots: Iterable[int] | None = None) -> list[int]:
        """Column indices of the base and of ``slots`` (default: the used ones), ascending."""
        chosen = sorted(self.used if slots is None else slots)
        units = list(range(self.base_width))
        for slot in chosen:
            columns = self.columns(slot)
            units.extend(range(columns.start, columns.stop))
        return units

    def filled(self, slot: int) -> Slots:
        return replace(self, used=(*self.used, slot))

    def save(self, directory: Path) -> None:
        (directory / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def load(directory: Path) -> Slots | None:
        """The layout beside a checkpoint, or None for a plain one."""
        path = directory / FILE
        if not path.is_file():
            return None
        values = json.loads(path.read_text())
        return Slots(**{**values, "used": tuple(values["used"])})
