"""The metrics of the headline table: shares of questions answered right.

A metric is a row of ``METRICS``, or a plug-in of kind "metric" that returns such a row
(``examples/my_metric.py``). The report and the terminal show whatever rows there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sleeprl.config.schema import ConfigError, NightConfig
from sleeprl.evaluation.questions import Day, Question
from sleeprl.plugins import create


@dataclass(frozen=True)
class Metric:
    """A column of the headline table."""

    key: str
    """``kind`` of its questions, and its name in ``summary.json``."""
    label: str
    """Heading of the column."""
    questions: Callable[[Sequence[str], int], Sequence[Question]] | None = None
    """Makes questions from the day's documents and the night's seed. None: the questions come with
    the day, from the embedded world or the file ``evaluation.questions``."""


METRICS = (
    Metric("recall", "Recall"),
    Metric("two_hop", "Two-hop"),
    Metric("retention", "Retention"),
)
"""The metrics of every night: the day, the day combined with earlier knowledge, earlier knowledge."""

RESERVED = ("exact_match", "f1", "perplexity", "n")
"""Other figures beside the metrics, which no metric may have for its key."""


def metrics_of(config: NightConfig) -> tuple[Metric, ...]:
    """List the metrics of a night: ``METRICS`` and the plug-ins of ``evaluation.metrics``.

    Raises:
        ConfigError: Two metrics have the same key, or one has that of another figure.
    """
    plugins: list[Metric] = [create(name, "metric", {}) for name in config.evaluation.metrics]
    metrics = (*METRICS, *plugins)
    keys = [metric.key for metric in metrics]
    for key in keys:
        if key in RESERVED:
            raise ConfigError(
                f"evaluation.metrics: a metric has the key {key!r}, which is another figure of the "
                "report; rename the metric"
            )
        if keys.count(key) > 1:
            raise ConfigError(
                f"evaluation.metrics: more than one metric has the key {key!r}; rename one"
            )
    return metrics


def add_questions(day: Day, metrics: Sequence[Metric], seed: int) -> Day:
    """Add the questions of those metrics that make their own.

    Args:
        day: The day.
        metrics: The metrics of the night.
        seed: Seed of the night.

    Returns:
        The day with all questions.
    """
    own = [
        replace(question, kind=metric.key)
        for metric in metrics
        if metric.questions is not None
        for question in metric.questions(day.documents, seed)
    ]
    return replace(day, probes=[*day.probes, *own])
