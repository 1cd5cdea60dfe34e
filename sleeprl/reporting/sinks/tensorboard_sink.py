"""Writes scalars for TensorBoard into ``tensorboard/`` of the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sleeprl.reporting.sinks.base import SinkRun, scalar_metrics

try:
    from tensorboard.summary import Writer
except ImportError as error:
    raise ImportError(
        f"it needs TensorBoard ({error}); run pip install 'sleeprl[tensorboard]'"
    ) from error


class TensorBoardSink:
    """Each metric is a scalar ``PHASE/METRIC``."""

    def __init__(self, run: SinkRun) -> None:
        self._writer = Writer(str(run.directory / "tensorboard"))

    def log(self, phase: str, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in scalar_metrics(metrics).items():
            self._writer.add_scalar(f"{phase}/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
