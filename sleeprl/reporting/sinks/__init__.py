"""Sends metrics to trackers beside ``metrics.jsonl``: TensorBoard, Weights & Biases, MLflow, or one's own.

A sink is named in ``reporting.sinks``. The trackers are set up by their own environment variables, such
as ``WANDB_PROJECT`` or ``MLFLOW_TRACKING_URI``.
"""

from sleeprl.reporting.sinks.base import MetricsSink, SinkRun, scalar_metrics
from sleeprl.reporting.sinks.threads import SinkThreads

__all__ = ["MetricsSink", "SinkRun", "SinkThreads", "scalar_metrics"]
