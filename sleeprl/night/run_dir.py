"""The directory of a run: results, timings, metrics and progress of its phases.

``state.json`` has the result of every finished phase, so a killed night resumes with the first
phase that is missing.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sleeprl.cluster.waits import WAITS
from sleeprl.config import loader as cfg
from sleeprl.config.schema import ConfigError, NightConfig
from sleeprl.reporting.metrics_log import MetricsLog
from sleeprl.reporting.progress import NightProgress
from sleeprl.reporting.sinks import SinkRun, SinkThreads
from sleeprl.utils.files import write_json_atomic, write_text_atomic

T = TypeVar("T")
CONFIG, STATE, SUMMARY, METRICS = "config.yaml", "state.json", "summary.json", "metrics.jsonl"
LAKE, ANSWERS = "lake", "answers"
"""Directories of the engines' output: all of it as trajectories, and the answers by state."""


class RunDirectory:
    """The phases of one night with their results, timings, metrics and progress.

    ``state`` is the content of ``state.json``:

    - ``id``: unique to this night; a later night may use the same directory name.
    - ``results``, ``seconds``: by the key of each finished phase.
    - ``wall_seconds``: of all attempts, each up to the last phase that it finished.
    - ``starting_seconds``: those in which the night only waited for processes to start.
    """

    def __init__(self, config: NightConfig, progress: NightProgress) -> None:
        """Open the directory of a run, or create it.

        Args:
            config: The settings of the night.
            progress: The progress display.
        """
        self.config, self.progress = config, progress
        self.dir = config.run_dir
        self.dir.mkdir(parents=True, exist_ok=True)
        write_text_atomic(self.dir / CONFIG, cfg.to_yaml(config))
        self.metrics = MetricsLog(self.dir / METRICS)
        self.state: dict[str, Any] = {"id": uuid.uuid4().hex, "results": {}, "seconds": {}}
        self.state |= {"wall_seconds": 0.0, "starting_seconds": 0.0}
        if (self.dir / STATE).is_file():
            self.state |= json.loads((self.dir / STATE).read_text())
        self._sinks = SinkThreads(
            config.reporting.sinks,
            SinkRun(self.state["id"], config.name, self.dir, cfg.to_dict(config)),
            progress.warn,
        )
        self._began = time.monotonic() - self.state["wall_seconds"]
        self._row = ""
        self._starting = self.state["starting_seconds"] - WAITS.total("start")

    def is_done(self, key: str) -> bool:
        """Return whether the result of a phase is recorded."""
        return key in self.state["results"]

    def result(self, key: str) -> Any:
        """Return the recorded result of a phase, or None."""
        return self.state["results"].get(key)

    def run_once(
        self, key: str, work: Callable[[], T], note: Callable[[T], str], row: str = ""
    ) -> T:
        """Run a phase and record its result, or return the recorded one.

        Args:
            key: Name of the result.
            work: Does the work; returns plain JSON.
            note: Describes the result for the progress display.
            row: Key of the row that displays it, if it is another.
        """
        if self.is_done(key):
            self.progress.skip(row or key, "done before")
            return self.result(key)
        result, seconds = self._run(row or key, work)
        self.state["results"][key] = result
        self.state["seconds"][key] = seconds
        self._save()
        self.progress.finish(row or key, note(result))
        return result

    def run_always(
        self, key: str, work: Callable[[], T], note: Callable[[T], str], row: str = ""
    ) -> T:
        """Run a phase whatever is recorded, since each attempt needs it. Its seconds add up.

        Args:
            key: Name of the phase.
            work: Does the work; returns plain JSON.
            note: Describes the result for the progress display.
            row: Key of the row that displays it, if it is another.
        """
        result, seconds = self._run(row or key, work)
        before = self.state["seconds"].get(key, 0.0)
        self.state["seconds"][key] = round(before + seconds, 2)
        self._save()
        self.progress.finish(row or key, note(result))
        return result

    def _run(self, row: str, work: Callable[[], T]) -> tuple[T, float]:
        """Do the work; returns its result and the seconds that it took."""
        began, self._row = time.monotonic(), row
        self.progress.start(row)
        return work(), round(time.monotonic() - began, 2)

    def _save(self) -> None:
        self.state["wall_seconds"] = round(time.monotonic() - self._began, 2)
        self.state["starting_seconds"] = round(self._starting + WAITS.total("start"), 2)
        write_json_atomic(self.dir / STATE, self.state)

    def log(
        self, key: str, step: int, metrics: dict[str, float], total: int, *bar_metrics: str
    ) -> None:
        """Write one step's metrics into the file and the sinks.

        Args:
            key: Key of the phase.
            step: Number of the step.
            metrics: Metrics by name.
            total: Number of steps of the phase.
            bar_metrics: Names of the metrics to display beside the progress bar.
        """
        self.metrics.write(key, step, **metrics)
        self._sinks.log(key, step, metrics)
        beside = {name.rsplit("/", 1)[-1]: metrics[name] for name in bar_metrics if name in metrics}
        self.progress.update(self._row or key, completed=step, total=total, **beside)

    def close(self) -> None:
        """Close the metrics file and the sinks."""
        self.metrics.close()
        self._sinks.close()


def refuse_existing(config: NightConfig) -> None:
    """Refuse to mix two nights in one directory.

    Raises:
        ConfigError: The directory has a run.
    """
    path = config.run_dir / CONFIG
    if path.is_file():
        done = (config.run_dir / SUMMARY).is_file()
        raise ConfigError(
            f"name={config.name!r}: {config.run_dir} holds a{' finished' if done else 'n unfinished'} run; "
            + (
                "give this night another name=..."
                if done
                else f"finish it with `sleeprl night --resume {config.run_dir}` or give another name=..."
            )
        )


def fresh_name(config: NightConfig) -> str:
    """Return the configured name, with the first free number appended if it is taken."""
    if not config.run_dir.exists():
        return config.name
    number = 2
    while (Path(config.runs) / f"{config.name}-{number}").exists():
        number += 1
    return f"{config.name}-{number}"


def resume(directory: Path) -> NightConfig:
    """Load the configuration of a run.

    Args:
        directory: The run; it may have been moved.

    Raises:
        ConfigError: It is not the directory of a run.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise ConfigError(
            f"{str(directory)!r} is not the directory of a run: there is no {CONFIG} in it"
        )
    config = cfg.load(path)
    if config.run_dir.resolve() != directory.resolve():
        config.runs, config.name = str(directory.parent), directory.name
    return config
