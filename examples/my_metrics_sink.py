"""A metrics sink: one CSV file for each phase.

sleeprl night reporting.sinks=[my_metrics_sink.CsvSink]        from this directory
"""

import csv
from collections.abc import Mapping
from typing import Any

from sleeprl.reporting.sinks import SinkRun, scalar_metrics


class CsvSink:
    """Writes ``PHASE.csv`` into the run's directory, with a line for each metric of a step."""

    def __init__(self, run: SinkRun) -> None:
        self.directory = run.directory

    def log(self, phase: str, step: int, metrics: Mapping[str, Any]) -> None:
        with (self.directory / f"{phase}.csv").open("a", newline="") as file:
            csv.writer(file).writerows(
                (step, name, value) for name, value in scalar_metrics(metrics).items()
            )

    def close(self) -> None:
        """Everything is written."""
