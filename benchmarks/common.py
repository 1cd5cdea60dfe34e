"""Shared parts of the benchmarks: CPU time, paired ratios, arguments, result files."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from sleeprl.evaluation.statistics import interval
from sleeprl.utils.files import write_json_atomic
from sleeprl.utils.machine import describe_environment

RESULTS = Path(__file__).parent / "results"


def cpu_seconds(root: int | None, without: int | None = None) -> float:
    """Sum the CPU seconds of a process and its descendants.

    Args:
        root: Process id; None for this process.
        without: Process id of a subtree that is left out.
    """
    seconds: dict[int, float] = {}
    for process in _tree(root):
        try:
            seconds[process.pid] = sum(process.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    for process in _tree(without) if without else ():
        seconds.pop(process.pid, None)
    return sum(seconds.values())


def _tree(root: int | None) -> list[psutil.Process]:
    process = psutil.Process(root)
    return [process, *process.children(recursive=True)]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Compute the geometric mean of ours / theirs, with its 95 % interval (t, on logarithms).

    Args:
        ours: Measurements, one per pair.
        theirs: The measurements to compare with, in the same order.

    Returns:
        ``mean``, ``low`` and ``high`` (None for one pair), and the ratios as ``pairs``.
    """
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    mean, half = interval(list(map(math.log, pairs)))
    low, high = (math.exp(mean - half), math.exp(mean + half)) if len(pairs) > 1 else (None, None)
    return {"mean": math.exp(mean), "low": low, "high": high, "pairs": pairs}


def format_ratio(found: dict[str, Any]) -> str:
    """Format a ratio, as in ``0.98 (0.96 to 1.01)``."""
    if found["low"] is None:
        return f"{found['mean']:.2f}"
    return f"{found['mean']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def arguments(about: str | None) -> argparse.ArgumentParser:
    """Create a parser with ``--quick`` and ``--output``, and a docstring as help."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--output", type=Path, help="directory of the JSON")
    return parser


def save(name: str, result: dict[str, Any], output: Path | None = None) -> None:
    """Write ``NAME.json`` with the command, the machine and versions.

    Args:
        name: Name of the file, without its suffix.
        result: The figures.
        output: Directory; by default ``benchmarks/results``.
    """
    whole = {"command": command(), **result, "environment": describe_environment()}
    write_json_atomic((output or RESULTS) / f"{name}.json", whole)


def command() -> str:
    """Return the command line of this process, without ``--output``."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--output")
    _, words = parser.parse_known_args()
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])
