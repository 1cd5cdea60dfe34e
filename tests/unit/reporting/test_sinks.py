"""Metrics sinks: real trackers get what a run logs, and no tracker can hold up or end a night."""

from __future__ import annotations

import csv
import math
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sleeprl.config.loader import load, to_dict
from sleeprl.config.validation import validate_plugins
from sleeprl.night.run_dir import RunDirectory
from sleeprl.plugins import PluginError
from sleeprl.reporting.metrics_log import read_metrics
from sleeprl.reporting.progress import NightProgress
from sleeprl.reporting.sinks import SinkRun, SinkThreads, scalar_metrics, threads
from tests.support.paths import ROOT

ROWS: list[tuple[str, int, dict[str, Any]]] = [
    ("consolidation", 1, {"new/kl": 3.0, "loss": 2.5}),
    ("consolidation", 2, {"new/kl": 1.5, "loss": math.nan}),
    ("dreaming", 1, {"reward": 0.25, "staleness_tokens": {"0": 30, "1": 10}, "age_seconds": [1.0]}),
]


@pytest.fixture
def run(tmp_path: Path) -> SinkRun:
    return SinkRun("0123abcd", "first", tmp_path, to_dict(load(None, ["seed=3"])))


def log_all(name: str, run: SinkRun) -> None:
    """Log the rows through a sink; a warning is a failure of the test."""
    sinks = SinkThreads([name], run, warn=pytest.fail)
    for row in ROWS:
        sinks.log(*row)
    sinks.close()


def test_scalars_are_finite_numbers_with_flat_names() -> None:
    found: dict[str, float] = {}
    for _, _, metrics in ROWS:
        found |= scalar_metrics(metrics)
    assert found == {
        "new/kl": 1.5, "loss": 2.5, "reward": 0.25, "staleness_tokens/0": 30, "staleness_tokens/1": 10,
    }  # fmt: skip


def test_tensorboard_reads_what_was_logged(run: SinkRun) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    log_all("tensorboard", run)
    events = EventAccumulator(str(run.directory / "tensorboard"))
    events.Reload()
    kl = events.Tensors("consolidation/new/kl")
    assert [(e.step, float(make_ndarray(e.tensor_proto))) for e in kl] == [(1, 3.0), (2, 1.5)]
    assert [e.step for e in events.Tensors("consolidation/loss")] == [1]
    assert "dreaming/staleness_tokens/1" in events.Tags()["tensors"]


def test_mlflow_has_one_run_for_a_night_and_its_resumption(
    run: SinkRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(run.directory)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{run.directory}/mlflow.db")
    log_all("mlflow", run)
    log_all("mlflow", run)
    client = MlflowClient()
    experiment = client.get_experiment_by_name("sleeprl")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "first" and found.info.status == "FINISHED"
    kl = client.get_metric_history(found.info.run_id, "consolidation/new/kl")
    assert {(metric.step, metric.value) for metric in kl} == {(1, 3.0), (2, 1.5)}
    assert found.data.metrics["dreaming/reward"] == 0.25


def test_wandb_keeps_an_offline_run(run: SinkRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_all("wandb", run)
    (log,) = (run.directory / "wandb").glob("offline-run-*/run-0123abcd.wandb")
    names = [b"consolidation/new/kl", b"dreaming/staleness_tokens", b"dreaming/step"]
    deadline = time.monotonic() + 60  # a process of its own writes the file
    while not all(name in log.read_bytes() for name in names):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_example_writes_what_a_run_directory_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    sinks = "reporting.sinks=[examples.my_metrics_sink.CsvSink]"
    config = load(None, [sinks, f"runs={tmp_path}", "name=first"])
    validate_plugins(config)
    directory = RunDirectory(config, NightProgress([("dreaming", "Dream")]))
    directory.progress.start("dreaming")
    for step in (1, 2):
        directory.log("dreaming", step, {"reward": 0.5 * step}, 2, "reward")
    directory.close()
    with (tmp_path / "first" / "dreaming.csv").open() as file:
        assert list(csv.reader(file)) == [["1", "reward", "0.5"], ["2", "reward", "1.0"]]
    assert [row["reward"] for row in read_metrics(tmp_path / "first" / "metrics.jsonl")] == [0.5, 1]


class Failing:
    """Fails at a chosen point."""

    where = ""
    opened = 0

    def __init__(self, run: SinkRun) -> None:
        Failing.opened += 1
        self._fail("open")

    def _fail(self, here: str) -> None:
        if Failing.where == here:
            raise ConnectionError("the tracker is away\n[red]")

    def log(self, phase: str, step: int, metrics: Mapping[str, Any]) -> None:
        self._fail("log")

    def close(self) -> None:
        self._fail("close")


class Hanging:
    """Never takes a metric."""

    def __init__(self, run: SinkRun) -> None: ...

    def log(self, phase: str, step: int, metrics: Mapping[str, Any]) -> None:
        threading.Event().wait(60)

    def close(self) -> None: ...


@pytest.mark.parametrize("where", ["open", "log", "close"])
def test_a_sink_that_fails_is_one_warning_and_the_others_go_on(
    run: SinkRun, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Failing, "where", where)
    monkeypatch.setattr(Failing, "opened", 0)
    warnings: list[str] = []
    sinks = SinkThreads([f"{__name__}.Failing", "tensorboard"], run, warnings.append)
    for row in ROWS:
        sinks.log(*row)
    sinks.close()
    (warning,) = warnings
    assert "Failing failed" in warning and "ConnectionError: the tracker is away" in warning
    assert Failing.opened == 1
    assert list((run.directory / "tensorboard").iterdir())


def test_a_sink_that_hangs_does_not_hold_up_the_night(
    run: SinkRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "CLOSE_TIMEOUT_S", 0.2)
    warnings: list[str] = []
    sinks = SinkThreads([f"{__name__}.Hanging"], run, warnings.append)
    for row in ROWS:
        sinks.log(*row)
    sinks.close()
    assert len(warnings) == 1 and "Hanging is still busy" in warnings[0]


def test_without_metrics_no_sink_is_opened(run: SinkRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Failing, "opened", 0)
    SinkThreads([f"{__name__}.Failing"], run, pytest.fail).close()
    assert Failing.opened == 0


@pytest.mark.parametrize(
    ("name", "library"), [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow")]
)
def test_a_missing_library_is_named_before_the_night_with_its_extra(
    name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, f"sleeprl.reporting.sinks.{name}_sink", raising=False)
    monkeypatch.setitem(sys.modules, library, None)  # Python's own way to say: not installed
    with pytest.raises(PluginError, match=rf"reporting\.sinks: .*sleeprl\[{name}\]"):
        validate_plugins(load(None, [f"reporting.sinks=[{name}]"]))


def test_an_unknown_sink_is_refused_with_those_there_are() -> None:
    with pytest.raises(PluginError, match=r"did you mean 'tensorboard'"):
        validate_plugins(load(None, ["reporting.sinks=[tensorbord]"]))
