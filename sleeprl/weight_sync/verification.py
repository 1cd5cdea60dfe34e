"""Proves that what arrived is what was sent.

Checksums tell that a tensor was damaged on its way, and which. The canary, a text whose
log-probabilities both sides must agree on after an update, tells that it was put to use: an
engine that was sent half of a fused layer, or whose packed head kept its old weights, reports
success and the new version; only its numbers tell. Where half precision's noise allows large
differences, they are compared with those of an earlier update too: an engine that loses small
updates stays where it was.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from sleeprl.utils.files import read_record, write_json_atomic

BLOCKS, BLOCK = 8, 1 << 11
MARGIN = 3.0
"""How many times as far as its scores are from one of two expectations both must be apart, to
tell that an engine is at that one."""


class StaleWeights(ConnectionError):
    """An engine's weights are not known to be right, so it does no work; another one may."""


class CorruptedWeights(RuntimeError):
    """A tensor did not arrive as it was sent."""


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of dtype, shape and bytes; of a large tensor 8 blocks of 2 KiB, spread over it."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    blocks = flat[None]
    if len(flat) > BLOCKS * BLOCK:
        blocks = flat.as_strided((BLOCKS, BLOCK), (len(flat) // BLOCKS, 1))
    found = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode())
    for block in blocks.cpu().numpy():
        found = zlib.crc32(block, found)
    return found


def check(tensors: Iterable[tuple[str, Tensor]], checksums: Mapping[str, int]) -> None:
    """Raise CorruptedWeights for the first tensor whose checksum is not the sender's."""
    for name, tensor in tensors:
        if name in checksums and checksum(tensor) != checksums[name]:
            raise CorruptedWeights(f"{name} did not arrive as it was sent (its checksum differs)")


@dataclass(frozen=True)
class Canary:
    """A text, and what the sender's weights make of it."""

    token_ids: list[int]
    """T ids."""
    logprobs: list[float]
    """The T-1 log-probabilities of ids 1..T-1 by the sender, in nats."""
    tolerance: float
    """The largest difference of a log-probability that passes, in nats."""
    fresh: list[float] | None = None
    """The log-probabilities of the checkpoint that an engine is started from, where the sender knows
    them."""

    def save(self, path: Path) -> None:
        write_json_atomic(path, asdict(self))

    @staticmethod
    def load(path: Path) -> Canary:
        return read_record(path, lambda values: Canary(**values))


@dataclass(frozen=True)
class UpdateReceipt:
    """How one engine ended one update. An engine that is not ``verified`` must get no work."""

    engine: str
    version: int
    verified: bool
    difference: float | None
    """Largest absolute difference of a log-probability, in nats; None without a canary."""
    tolerance: float | None
    seconds: float
    """From the beginning of the update until requests went on."""
    error: str | None = None
    """Why the update did not end verified."""

    def __str__(self) -> str:
        how = (
            "unchecked"
            if self.difference is None
            else f"canary {self.difference:.1e} of {self.tolerance:.0e}"
        )
        state = "verified" if self.verified else f"STALE ({self.error})"
        return (
            f"{self.engine} at version {self.version}: {state}, {how}, {self.seconds * 1000:.0f} ms"
        )


def largest_difference(expected: Sequence[float], found: Sequence[float]) -> float:
    """Return the largest absolute difference; NaN where there is a NaN."""
    if len(expected) != len(found):
        raise ValueError(
            f"canary has {len(expected)} log-probabilities, the engine gave {len(found)}"
        )
    # max() alone would pass over a NaN: every comparison with it is false.
    differences = [abs(a - b) for a, b in zip(expected, found, strict=True)]
    return math.nan if any(map(math.isnan, differences)) else max(differences, default=0.0)


def reached(old: Sequence[float], new: Sequence[float], found: Sequence[float]) -> bool | None:
    """Tell whether scores moved with the sender's, by mean absolute differences.

    Noise of less than two thirds of the way from old to new cannot bring right weights' scores to
    within a third of it of old; and larger noise, unless it happens to be the update backwards,
    leads away from both.

    Args:
        old: The sender's log-probabilities before the update, in nats.
        new: The sender's after it.
        found: The engine's after it.

    Returns:
        True for an engine that is at ``new``, False for one at ``old``, None where noise hides it.
    """
    way = _mean_difference(old, new)
    if MARGIN * _mean_difference(new, found) < way:
        return True
    return False if MARGIN * _mean_difference(old, found) < way else None


def _mean_difference(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / max(1, len(a))
