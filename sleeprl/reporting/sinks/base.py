"""What a metrics sink is, and what it knows of its run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

KIND = "metrics_sink"


@dataclass(frozen=True)
class SinkRun:
    """The run whose metrics a sink gets."""

    id: str
    """Unique for the night; a resumed run keeps it."""
    name: str
    directory: Path
    config: Mapping[str, Any]
    """Every setting of the night, as nested plain data."""


class MetricsSink(Protocol):
    """Where metrics go beside ``metrics.jsonl``.

    A sink is made by a call with ``run``, a ``SinkRun``, as keyword. That and every method are called
    in a thread of the sink's own, in the order in which the night logs. What they raise is shown as one
    warning, and the sink gets nothing more.
    """

    def log(self, phase: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Take the metrics of one step.

        Args:
            phase: Phase of the night, such as ``consolidation``. Each counts its steps from 1.
            step: Step of the phase. A resumed night may log a step again; the last counts.
            metrics: Numbers, text, and lists and mappings of numbers, by name.
        """

    def close(self) -> None:
        """Write what is left. Called once, also after a failed night."""


def scalar_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers among metrics; those of a mapping are named ``name/key``."""
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            numbers |= scalar_metrics({f"{name}/{key}": part for key, part in value.items()})
        elif isinstance(value, (int, float)) and math.isfinite(value):
            numbers[name] = float(value)
    return numbers
