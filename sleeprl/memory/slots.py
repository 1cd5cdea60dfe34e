"""The pool of expert slots of a checkpoint: which columns of its MLPs each expert occupies. Pure.

A gated MLP with an expert of width w in parallel *is* a gated MLP whose intermediate size is larger
by w. So a checkpoint that can grow is an ordinary one whose MLPs are widened once, by ``count *
width`` zero columns. A slot is a range of those columns, and growing means filling the next free
slot.

Low-rank experts have the same layout: all of a checkpoint's slots are one LoRA of rank ``count *
width`` beside the base, and a slot is a range of its ranks.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sleeprl.utils.files import read_record

FILE = "slots.json"
MULTIPLE, NARROW = 256, 1024
"""Grown MLPs have a multiple of so many hidden units, unless they have fewer than ``NARROW``."""
GATED_MLP, LOW_RANK = "gated_mlp", "low_rank"


class PoolFull(RuntimeError):
    """A level without a free slot; one has to be emptied before the level can take another expert."""


def padding_of(width: int) -> int:
    """Return how many columns an MLP lacks to a width that quantisers and FP8 kernels take.

    Models with narrow MLPs, such as the embedded one, are not padded.
    """
    return -width % MULTIPLE if width >= NARROW else 0


@dataclass(frozen=True)
class Slots:
    """Slot layout of a checkpoint."""

    base_width: int
    """Number of columns before the first slot: the intermediate size, or 0 for low-rank experts."""
    width: int
    """Hidden units, or rank, of a slot in each layer."""
    count: int
    """Number of slots of all levels together."""
    used: tuple[int, ...] = ()
    """Slots with an expert, in the order in which they were filled."""
    pools: tuple[int, ...] = ()
    """Number of slots of each level, fastest first. The slots of a level, and so its columns, are
    contiguous. By default one level has them all."""
    growth: str = GATED_MLP
    """Kind of expert in the slots: the name of a ``growth.Growth``."""
    padding: int = 0
    """Zero columns behind the last slot, which nothing is ever written to (``padding_of``)."""

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
        """Number of columns, or ranks, of the base, all slots, and the padding."""
        return self.base_width + self.count * self.width + self.padding

    # --- levels -------------------------------------------------------------------

    @property
    def levels(self) -> int:
        """Number of levels."""
        return len(self.pools)

    def of_level(self, level: int) -> range:
        """Return the slots of a level; level 1 is the fastest.

        Raises:
            ValueError: There is no such level.
        """
        if not 1 <= level <= self.levels:
            raise ValueError(f"level={level} does not exist; the levels are 1 to {self.levels}")
        start = sum(self.pools[: level - 1])
        return range(start, start + self.pools[level - 1])

    def used_in(self, level: int) -> tuple[int, ...]:
        """Return the slots of a level that have an expert, oldest first."""
        own = self.of_level(level)
        return tuple(slot for slot in self.used if slot in own)

    def next_free(self, level: int = 1) -> int:
        """Return the first free slot of a level.

        Raises:
            PoolFull: All slots of the level are in use.
        """
        for slot in self.of_level(level):
            if slot not in self.used:
                return slot
        raise PoolFull(
            f"all {self.pools[level - 1]} slots of level {level} are in use; start from a "
            "plain model with more (memory.levels) or roll back to an earlier generation"
        )

    # --- columns ------------------------------------------------------------------

    def columns(self, slot: int) -> slice:
        """Return the hidden units (or ranks) of one slot."""
        start = self.base_width + slot * self.width
        return slice(start, start + self.width)

    def level_columns(self, level: int) -> slice:
        """Return the hidden units (or ranks) of all slots of a level."""
        own = self.of_level(level)
        return slice(
            self.base_width + own.start * self.width, self.base_width + own.stop * self.width
        )

    def occupied_columns(self, slots: Iterable[int] | None = None) -> list[int]:
        """Return the column indices of the base and of ``slots`` (default: those in use), ascending."""
        chosen = sorted(self.used if slots is None else slots)
        units = list(range(self.base_width))
        for slot in chosen:
            columns = self.columns(slot)
            units.extend(range(columns.start, columns.stop))
        return units

    # --- changes ------------------------------------------------------------------

    def filled(self, slot: int) -> Slots:
        """Return the layout after an expert is written to ``slot``."""
        return replace(self, used=(*self.used, slot))

    def freed(self, slots: Collection[int]) -> Slots:
        """Return the layout after ``slots`` are reset.

        Raises:
            ValueError: One of them is not in use.
        """
        self.require_used(slots)
        return replace(self, used=tuple(slot for slot in self.used if slot not in slots))

    def merged(self, slot: int) -> Slots:
        """Return the layout after ``slot`` is merged into the base, which frees the slot.

        Hidden units of a gated MLP become base columns, so the pool moves up by the width of a
        slot. A low-rank expert is added to the base weights, whose size does not change.
        """
        if self.growth != GATED_MLP:
            return self.freed([slot])
        base = self.base_width + self.width
        padding = padding_of(base + self.count * self.width)
        return replace(self.freed([slot]), base_width=base, padding=padding)

    def require_used(self, slots: Collection[int]) -> None:
        """Raise ValueError unless all of ``slots`` are in use."""
        if not set(slots) <= set(self.used):
            raise ValueError(f"slots {sorted(slots)} are not all in use; used={list(self.used)}")

    # --- on disk ------------------------------------------------------------------

    def save(self, directory: Path) -> None:
        """Write the layout into a checkpoint's directory."""
        values = asdict(self)
        if not self.padding:
            del values["padding"]
        text = json.dumps(values, indent=2) + "\n"
        (directory / FILE).write_text(text, encoding="utf-8")

    @staticmethod
    def load(directory: Path) -> Slots | None:
        """Read the layout of a checkpoint; return None for a plain one.

        A file without ``pools`` predates levels: all its slots belong to level 1.
        """
        path = directory / FILE
        if not path.is_file():
            return None
        return read_record(
            path,
            lambda values: Slots(
                **{**values, **{key: tuple(values.get(key, ())) for key in ("used", "pools")}}
            ),
        )
