"""Writes and reads ``metrics.jsonl``: one line per step of a phase, readable while it grows."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_RESERVED = frozenset({"time", "not_finite"})
_log = logging.getLogger(__name__)


class MetricsLog:
    """Appends ``{"time", "phase", "step", **metrics}`` lines to one file.

    ``time`` is in seconds since the epoch. NaN and infinity are not JSON: they are written as null,
    and their names are listed under ``not_finite``.

    Guarantees:
        * Every call of ``write`` is one ``write(2)`` of one whole line, so that a reader sees whole
          lines, with at most the last one torn by a kill.
        * Opening the log repairs a torn line, so that a resumed run goes on in the same file.

    One process writes at a time.
    """

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.time) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _repair_last_line(self.path)
        self._clock = clock
        self._file = self.path.open("ab", buffering=0)

    def write(self, phase: str, step: int, **metrics: Any) -> None:
        """Record the metrics of one step.

        Args:
            phase: Phase of the night.
            step: Step of the phase.
            metrics: Numbers, text, or lists and dicts of them. NumPy and torch scalars are converted.

        Raises:
            ValueError: A metric is named ``time`` or ``not_finite``.
            TypeError: JSON cannot hold a value.
            OSError: The line could not be written whole.
        """
        if taken := _RESERVED & metrics.keys():
            raise ValueError(f"metric names {sorted(taken)} are taken by the log itself")
        not_finite: list[str] = []
        row = {"time": self._clock(), "phase": phase, "step": step}
        row |= {name: _to_json(value, name, not_finite) for name, value in metrics.items()}
        if not_finite:
            row["not_finite"] = not_finite
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        if self._file.write(line) != len(line):
            raise OSError(f"{self.path}: a metrics line was cut short; is the disk full?")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return all whole lines of a metrics file, in order; an absent file has none.

    A torn last line is normal, after a kill or beside a writer, and is left out silently. A broken
    line elsewhere is left out with a warning.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _parse(line)
        if row is not None:
            rows.append(row)
        elif line.strip() and number < len(lines):
            _log.warning("%s: line %d is broken and was left out", path, number)
    return rows


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # includes text cut inside a character
        return None
    return row if isinstance(row, dict) else None


def _repair_last_line(path: Path) -> None:
    """Make the file end in a newline: complete a whole last line, cut off a torn one."""
    data = path.read_bytes() if path.exists() else b""
    if not data or data.endswith(b"\n"):
        return
    whole = data.rfind(b"\n") + 1
    with path.open("r+b") as file:
        if _parse(data[whole:]) is None:
            file.truncate(whole)
        else:
            file.seek(0, 2)
            file.write(b"\n")


def _to_json(value: Any, name: str, not_finite: list[str]) -> Any:
    """Return ``value`` as JSON can hold it, and add the names of NaN and infinity to ``not_finite``."""
    if callable(getattr(value, "item", None)):  # NumPy's and torch's scalars have it
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        not_finite.append(name)
        return None
    if isinstance(value, Mapping):
        return {key: _to_json(part, f"{name}.{key}", not_finite) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(part, f"{name}[{i}]", not_finite) for i, part in enumerate(value)]
    return value
