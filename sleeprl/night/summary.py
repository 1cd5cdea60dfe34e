"""Builds ``summary.json``, the summary of a finished night."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sleeprl.config.methods import METHODS
from sleeprl.evaluation.metrics import metrics_of
from sleeprl.night.phases import Phase, results_for_summary
from sleeprl.night.run_dir import RunDirectory
from sleeprl.utils.machine import describe_environment

PICTURED = "fine_tuning"
"""The baseline in the report's picture, beside the night."""


def summarise(run: RunDirectory, phases: Sequence[Phase]) -> dict[str, Any]:
    """Collect ``summary.json`` from the results of a finished night.

    Args:
        run: The finished run.
        phases: Its phases.

    Returns:
        Among others:

        - ``before``, ``before_with_context``, ``after``: figures of the model by metric, with the
          number of questions under ``n``.
        - ``baselines``: figures, ``steps``, ``tokens`` and ``seconds`` of each method by name;
          ``fine_tuned`` is the one in the report's picture.
        - ``metrics``: label of each metric of the headline table.
        - ``seconds``: by phase; ``starting`` cuts across them: all seconds in which the night only
          waited for processes to start. ``wall_seconds`` includes the time between the phases.
        - The result of each phase that has a ``summary_key``.
    """
    results, state, config = run.state["results"], run.state, run.config
    baselines = {name: _baseline(name, run) for name in config.baselines}
    pictured = {"fine_tuned": baselines[PICTURED]} if PICTURED in baselines else {}
    dreams = results.get("dreaming", {})
    return {
        "name": config.name,
        "model": config.model.name,
        "seed": config.seed,
        "slept_on": _describe_day(run),
        **results["before"],
        **pictured,
        **results["after"],
        "metrics": {metric.key: metric.label for metric in metrics_of(config)},
        "baselines": baselines,
        "seconds": {**state["seconds"], "starting": state["starting_seconds"]},
        "wall_seconds": state["wall_seconds"],
        "gate": results["commit"]["gate"],
        "generation": results["commit"]["generation"],
        "idle": dreams.get("idle", {}),
        "samples": dreams.get("samples", []),
        **results_for_summary(phases, run.result),
        "trained_tokens": results["consolidation"]["tokens"],
        "environment": describe_environment(),
    }


def _describe_day(run: RunDirectory) -> str:
    """Describe the day in a few words."""
    if run.config.wake.inputs:
        return f"{run.result('wake')['documents']} documents"
    return f"{run.config.wake.people} new people"


def _baseline(name: str, run: RunDirectory) -> dict[str, Any]:
    """Collect figures and cost of one baseline."""
    result = run.result(name)
    return {
        "title": METHODS[name].title,
        **result["figures"],
        "steps": result["steps"],
        "tokens": result["tokens"],
        "seconds": run.state["seconds"][name],
    }
