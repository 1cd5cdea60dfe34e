"""The pool of expert slots of a checkpoint: which columns of its MLPs hold what. Pure.

A gated MLP with an expert of width w beside it *is* a gated MLP whose
intermediate size is larger by w. So a checkpoint that can grow is an ordinary
one whose MLPs were widened once by ``count * width`` zero columns; a slot is a
range of those columns, and growing is filling the next free one.

Low-rank experts are laid out the same way: all of a checkpoint's slots are one
LoRA of rank ``count * width`` beside the base, and a slot is a range of its ranks.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

FILE = "slots.json"
GATED_MLP, LOW_RANK = "gated_mlp", "low_rank"


class PoolFull(RuntimeError):
    """Every slot of a level holds something; it must be emptied before it can take more."""


@dataclass(frozen=True)
class Slots:
    """Layout of one checkpoint's pools."""

    base_width: int
    """Columns before any slot: the intermediate size, or 0 for low-rank experts."""
    width: int
    """Hidden units, or rank, per layer and slot."""
    count: int
    """Slots allocated, of all levels."""
    used: tuple[int, ...] = ()
    """Slots with an expert, in the order in which they were filled."""
    pools: tuple[int, ...] = ()
    """Number of slots of each level, fastest first; each level's slots, and so its columns, are
    contiguous. By default one level has them all."""
    growth: str = GATED_MLP
    """What a slot holds: the name of a ``growth.Growth``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "pools", self.pools or (self.count,))
        if any(not 0 <= slot < self.count for slot in self.used) or len(set(self.used)) < len(
            self.used
        ):
            raise ValueError(
                f"slots used={list(self.used)} must be distinct and below count={self.count}"
            )
        if sum(self.pools) != self.count or any(size < 0 for size in self.pools):
            raise ValueError(f"pools={list(self.pools)} must add up to count={self.count}")

    @property
    def total_width(self) -> int:
        return self.base_width + self.count * self.width

    # --- levels -------------------------------------------------------------------

    @property
    def levels(self) -> int:
        return len(self.pools)

    def of_level(self, level: int) -> range:
        """The slots of a level; 1 is the fastest."""
        if not 1 <= level <= self.levels:
            raise ValueError(f"level={level} does not exist; the levels are 1 to {self.levels}")
        start = sum(self.pools[: level - 1])
        return range(start, start + self.pools[level - 1])

    def used_in(self, level: int) -> tuple[int, ...]:
        """The slots of a level that hold something, the oldest first."""
        own = self.of_level(level)
        return tuple(slot for slot in self.used if slot in own)

    def next_free(self, level: int = 1) -> int:
        for slot in self.of_level(level):
            if slot not in self.used:
                return slot
        raise PoolFull(
            f"all {self.pools[level - 1]} slots of level {level} are in use; start from a "
            "plain model with more (memory.levels) or roll back to an earlier generation"
        )

    # --- columns ------------------------------------------------------------------

    def columns(self, slot: int) -> slice:
        """The intermediate units (or ranks) of one slot."""
        start = self.base_width + slot * self.width
        return slice(start, start + self.width)

    def level_columns(self, level: int) -> slice:
        """The intermediate units (or ranks) of all slots of a level."""
        own = self.of_level(level)
        return slice(
            self.base_width + own.start * self.width, self.base_width + own.stop * self.width
        )

    def occupied_columns(self, slots: Iterable[int] | None = None) -> list[int]:
        """Column indices of the base and of ``slots`` (default: the used ones), ascending."""
        chosen = sorted(self.used if slots is None else slots)
        units = list(range(self.base_width))
        for slot in chosen:
            columns = self.columns(slot)
            units.extend(range(columns.start, columns.stop))
        return units

    # --- changes ------------------------------------------------------------------

    def filled(self, slot: int) -> Slots:
        return replace(self, used=(*self.used, slot))

    def freed(self, slots: Collection[int]) -> Slots:
        """The layout after ``slots`` were reset."""
        self.require_used(slots)
        return replace(self, used=tuple(slot for slot in self.used if slot not in slots))

    def merged(self, slot: int) -> Slots:
        """The layout after ``slot`` became part of the base: the slot is free again.

        Hidden units of a gated MLP become base columns, so the pool moves up by a
        slot's width; a low-rank expert is added into weights that stay as wide.
        """
        grown = self.width if self.growth == GATED_MLP else 0
        return replace(self.freed([slot]), base_width=self.base_width + grown)

    def require_used(self, slots: Collection[int]) -> None:
        """Raises ValueError unless every one of ``slots`` holds something."""
        if not set(slots) <= set(self.used):
            raise ValueError(f"slots {sorted(slots)} are not all in use; used={list(self.used)}")

    # --- on disk ------------------------------------------------------------------

    def save(self, directory: Path) -> None:
        (directory / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def load(directory: Path) -> Slots | None:
        """The layout beside a checkpoint, or None for a plain one.

        A file from before there were levels has no ``pools``: all its slots are of level 1.
        """
        path = directory / FILE
        if not path.is_file():
            return None
        values = json.loads(path.read_text())
        values.update({key: tuple(values.get(key, ())) for key in ("used", "pools")})
        return Slots(**values)
