"""The directory of one run: what is done, what came of it, and how it is shown.

``state.json`` holds the result of every finished phase, so a killed night goes on
with the first phase that is missing.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sleeprl.config import loader as cfg
from sleeprl.config.schema import ConfigError, NightConfig
from sleeprl.reporting.metrics_log import MetricsLog
from sleeprl.reporting.progress import NightProgress
from sleeprl.utils.files import write_json_atomic, write_text_atomic

T = TypeVar("T")
CONFIG, STATE, SUMMARY, METRICS = "config.yaml", "state.json", "summary.json", "metrics.jsonl"
ANSWERS = "answers"


class RunDirectory:
    """Phases of one night with their results, timings, metrics and progress. ``state["id"]`` is this
    night's alone: another may have its directory one day. ``state["wall_seconds"]`` is of all attempts,
    each up to the last phase that it finished.

    A key may have parts, ``levels-2-texts``: its first part names the line that shows it.
    """

    def __init__(self, config: NightConfig, progress: NightProgress) -> None:
        self.config, self.progress = config, progress
        self.dir = config.run_dir
        self.dir.mkdir(parents=True, exist_ok=True)
        write_text_atomic(self.dir / CONFIG, cfg.to_yaml(config))
        self.metrics = MetricsLog(self.dir / METRICS)
        self.state: dict[str, Any] = {"id": uuid.uuid4().hex, "results": {}, "seconds": {}}
        self.state["wall_seconds"] = 0.0
        if (self.dir / STATE).is_file():
            self.state |= json.loads((self.dir / STATE).read_text())
        self._began = time.monotonic() - self.state["wall_seconds"]

    def done(self, key: str) -> bool:
        return key in self.state["results"]

    def result(self, key: str) -> Any:
        return self.state["results"].get(key)

    def phase(self, key: str, work: Callable[[], T], note: Callable[[T], str] = lambda _: "") -> T:
        """Do ``work`` and record its result (plain JSON), or return what is recorded."""
        if self.done(key):
            self.progress.skip(_line(key), "done before")
            return self.result(key)
        result, seconds = self._do(key, work)
        self.state["results"][key] = result
        self.state["seconds"][key] = seconds
        self._save()
        self.progress.finish(_line(key), note(result))
        return result

    def attempt(self, key: str, work: Callable[[], T], note: Callable[[T], str]) -> T:
        """Do ``work`` whatever is recorded: what each attempt needs. Its seconds add up."""
        result, seconds = self._do(key, work)
        before = self.state["seconds"].get(key, 0.0)
        self.state["seconds"][key] = round(before + seconds, 2)
        self._save()
        self.progress.finish(_line(key), note(result))
        return result

    def _do(self, key: str, work: Callable[[], T]) -> tuple[T, float]:
        began = time.monotonic()
        self.progress.start(_line(key))
        return work(), round(time.monotonic() - began, 2)

    def _save(self) -> None:
        self.state["wall_seconds"] = round(time.monotonic() - self._began, 2)
        write_json_atomic(self.dir / STATE, self.state)

    def log(self, phase: str, step: int, metrics: dict[str, float], total: int, *show: str) -> None:
        """One step's metrics into the file and the bar; ``show`` names those beside the bar."""
        self.metrics.write(phase, step, **metrics)
        shown = {name.rsplit("/", 1)[-1]: metrics[name] for name in show if name in metrics}
        self.progress.update(_line(phase), completed=step, total=total, **shown)

    def close(self) -> None:
        self.metrics.close()


def _line(key: str) -> str:
    return key.partition("-")[0]


def refuse_existing(config: NightConfig) -> None:
    """Refuse to mix two nights in one directory."""
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
    """The configured name, or with the first free number behind it."""
    if not config.run_dir.exists():
        return config.name
    number = 2
    while (Path(config.runs) / f"{config.name}-{number}").exists():
        number += 1
    return f"{config.name}-{number}"


def resume(directory: Path) -> NightConfig:
    """The configuration of an unfinished run."""
    path = directory / CONFIG
    if not path.is_file():
        raise ConfigError(
            f"{str(directory)!r} is not the directory of a run: there is no {CONFIG} in it"
        )
    config = cfg.load(path)
    if config.run_dir.resolve() != directory.resolve():
        config.runs, config.name = str(directory.parent), directory.name
    return config
