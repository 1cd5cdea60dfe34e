"""Logs to MLflow, which is set up by its own variables: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from sleeprl.reporting.sinks.base import SinkRun, scalar_metrics

try:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
except ImportError as error:
    raise ImportError(f"it needs MLflow ({error}); run pip install 'sleeprl[mlflow]'") from error

RUN_TAG = "sleeprl.run"
"""Tag that holds the night's id, by which a resumed night finds its run."""


class MLflowSink:
    """Each metric is ``PHASE/METRIC`` at the phase's step."""

    def __init__(self, run: SinkRun) -> None:
        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "sleeprl")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        earlier = self._client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{run.id}'")
        if earlier:
            self._run_id = earlier[0].info.run_id
            return
        tags = {RUN_TAG: run.id, "sleeprl.directory": str(run.directory)}
        created = self._client.create_run(experiment, tags=tags, run_name=run.name)
        self._run_id = created.info.run_id
        self._client.log_dict(self._run_id, dict(run.config), "config.yaml")

    def log(self, phase: str, step: int, metrics: Mapping[str, Any]) -> None:
        now_ms = int(time.time() * 1000)
        batch = [
            Metric(f"{phase}/{name}", value, now_ms, step)
            for name, value in scalar_metrics(metrics).items()
        ]
        self._client.log_batch(self._run_id, metrics=batch)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)
