"""Logs to Weights & Biases, which is set up by its own variables: WANDB_PROJECT, WANDB_MODE, ..."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from sleeprl.reporting.sinks.base import SinkRun, scalar_metrics

try:
    import wandb
except ImportError as error:
    raise ImportError(
        f"it needs Weights & Biases ({error}); run pip install 'sleeprl[wandb]'"
    ) from error


class WandbSink:
    """Each metric is ``PHASE/METRIC``, over ``PHASE/step``, because every phase counts from 1."""

    def __init__(self, run: SinkRun) -> None:
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "sleeprl"),
            name=run.name,
            id=run.id,
            resume="allow",
            dir=str(run.directory),
            config=dict(run.config),
        )
        self._phases: set[str] = set()

    def log(self, phase: str, step: int, metrics: Mapping[str, Any]) -> None:
        if phase not in self._phases:
            self._phases.add(phase)
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
        values = {f"{phase}/{name}": value for name, value in scalar_metrics(metrics).items()}
        self._run.log({f"{phase}/step": step, **values})

    def close(self) -> None:
        self._run.finish()
