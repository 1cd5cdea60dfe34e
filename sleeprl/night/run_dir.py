"""The directory of a run: results, timings, metrics and progress of its phases.

``state.json`` has the result of every finished phase, so a killed night resumes with the first
phase that is missing.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sleeprl.cluster.waits import WAITS
from sleeprl.config import loader as cfg
from sleeprl.config.schema import ConfigError, NightConfig
from sleeprl.night import stored_config
from sleeprl.night.stored_config import CONFIG
from sleeprl.reporting.metrics_log import MetricsLog, read_metrics
from sleeprl.reporting.progress import NightProgress
from sleeprl.reporting.sinks import SinkRun, SinkThreads
from sleeprl.utils.files import DamagedFile, read_json, write_json_atomic, write_text_atomic

T = TypeVar("T")
STATE, SUMMARY, METRICS, LOCK = "state.json", "summary.json", "metrics.jsonl", ".lock"
LAKE, ANSWERS = "lake", "answers"
"""Directories of the engines' output: all of it as trajectories, and the answers by state."""


class RunTaken(ConfigError):
    """The directory has another run, or another process runs it."""


class RunLock:
    """Held by the process that runs a night; the system releases it if the process dies.

    Where a file system has no locks, nothing is locked.
    """

    def __init__(self, directory: Path) -> None:
        """Take the lock of a run, whose directory is created where it is missing.

        Raises:
            RunTaken: Another process has it; the message has its pid.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._file = (directory / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise RunTaken(
                f"{directory} is being run by the process {holder}; wait for its end, or stop it "
                "with Ctrl-C or `kill -INT PID` and then resume"
            ) from None
        except OSError:
            return
        self._file.truncate(0)
        self._file.write(f"{os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        """Give the lock back."""
        self._file.close()


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

        Raises:
            RunTaken: Another process runs this night.
            DamagedFile: ``state.json`` cannot be read.
        """
        self.config, self.progress = config, progress
        self.dir = config.run_dir
        self._lock = RunLock(self.dir)
        write_text_atomic(self.dir / CONFIG, stored_config.to_text(config))
        self.metrics = MetricsLog(self.dir / METRICS)
        self.state: dict[str, Any] = {"id": uuid.uuid4().hex, "results": {}, "seconds": {}}
        self.state |= {"wall_seconds": 0.0, "starting_seconds": 0.0}
        self.state |= read_state(self.dir)
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

    def recorded_steps(self, key: str) -> set[int]:
        """Return the steps of a phase that the metrics file has."""
        rows = read_metrics(self.dir / METRICS)
        return {row["step"] for row in rows if row.get("phase") == key and "step" in row}

    def close(self) -> None:
        """Close the metrics file and the sinks."""
        self.metrics.close()
        self._sinks.close()
        self._lock.release()


def read_state(directory: Path) -> dict[str, Any]:
    """Read the ``state.json`` of a run; empty where no phase has finished.

    Raises:
        DamagedFile: It cannot be read; the message names it.
    """
    path = directory / STATE
    if not path.is_file():
        return {}
    state = read_json(path)
    if not isinstance(state, dict):
        raise DamagedFile(f"{path} is damaged: it is not a JSON object; restore it from a copy")
    for key, kind in (("id", str), ("results", dict), ("seconds", dict)):
        if not isinstance(state.get(key), kind):
            raise DamagedFile(f"{path} is damaged: {key!r} is missing; restore it from a copy")
    return state


def claim(config: NightConfig) -> None:
    """Make the directory of a new run this night's: of several that start at once, one gets it.

    Raises:
        RunTaken: The directory has a run already.
    """
    lock = RunLock(config.run_dir)
    try:
        refuse_existing(config)
        write_text_atomic(config.run_dir / CONFIG, stored_config.to_text(config))
    finally:
        lock.release()


def refuse_existing(config: NightConfig) -> None:
    """Refuse to mix two nights in one directory.

    Raises:
        RunTaken: The directory has a run.
    """
    path = config.run_dir / CONFIG
    if path.is_file():
        here = f"name={config.name!r}: {config.run_dir} holds"
        if (config.run_dir / SUMMARY).is_file():
            raise RunTaken(f"{here} a finished run; give this night another name=...")
        raise RunTaken(
            f"{here} an unfinished run; finish it with `sleeprl night --resume {config.run_dir}` "
            "or give another name=..."
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
        ConfigError: It is not the directory of a run, or its configuration cannot be used.
        DamagedFile: A file of the run is damaged; the message names it.
    """
    if not (directory / CONFIG).is_file():
        raise ConfigError(
            f"{str(directory)!r} is not the directory of a run: there is no {CONFIG} in it"
        )
    met = "wake" in read_state(directory).get("results", {})
    return stored_config.load(directory, inputs_are_read=met)
