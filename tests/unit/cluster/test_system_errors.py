"""What a user can mend is one message without a traceback, and says how to go on."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sleeprl import api, cli
from sleeprl.cluster import failures
from sleeprl.cluster.failures import ActorFailure, Failure, FailureKind, describe_system_error
from sleeprl.night.orchestrator import describe_resume


class WorkerGroupError(Exception):
    """Stands for Ray Train's."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"Training failed due to worker errors:\n{cause}")
        self.worker_failures = {0: cause}


class Wrapped(Exception):
    """Stands for Ray Train's exception of a worker, which shows a traceback."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"Traceback\n  File 'x'\n{type(cause).__name__}: {cause}")
        self._base_exc = cause


class ActorDiedError(Exception):
    """Stands for Ray's."""

    actor_id = "ab12"


def of_an_actor(text: str) -> ActorFailure:
    trace = f"Traceback (most recent call last):\n  File 'x.py', line 1\n{text}"
    return ActorFailure("engine-0.rollout", Failure(FailureKind.FATAL, text, trace))


KINDS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EROFS: "runs=...",
    errno.EACCES: "runs=...",
    errno.ENAMETOOLONG: "shorter",
    errno.EMFILE: "ulimit -n",
    errno.EISDIR: "not a directory",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EIO: "system's log",
    errno.ELOOP: "",
}


def shown(error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> tuple[int, str]:
    def run() -> None:
        raise error

    monkeypatch.delenv("SLEEPRL_TRACEBACK", raising=False)
    monkeypatch.setattr(cli, "app", run)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize("number", KINDS, ids=[errno.errorcode[number] for number in KINDS])
def test_an_error_of_the_system_is_one_line(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = OSError(number, os.strerror(number), "/data/[red]runs")
    code, text = shown(error, monkeypatch, capsys)
    assert code == 2 and text.count("\n") == 1
    assert f"{os.strerror(number)}: /data/[red]runs" in text and KINDS[number] in text
    code, text = shown(OSError(number, os.strerror(number)), monkeypatch, capsys)
    assert code == 1 and text.count("\n") == 1 and os.strerror(number) in text


@pytest.mark.parametrize(
    "error",
    [
        of_an_actor("OSError: [Errno 28] No space left on device: '/data/run/x'"),
        of_an_actor("safetensors_rust.SafetensorError: I/O error: No space left on device (os error 28)"),
        WorkerGroupError(OSError(28, "No space left on device", "/data/run/x")),
        WorkerGroupError(Wrapped(OSError(28, "No space left on device", "/data/run/x"))),
        WorkerGroupError(of_an_actor("OSError: [Errno 28] No space left on device")),
        RuntimeError("Error while serializing: No space left on device (os error 28)"),
    ],
)  # fmt: skip
def test_a_full_disk_behind_an_actor_is_the_same_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(failures, "_full_places", lambda: ["/data (1 MB free)"])
    code, text = shown(error, monkeypatch, capsys)
    assert code == 1 and text.count("\n") == 1
    assert "No space left on device" in text and "nearly full: /data (1 MB free)" in text
    if "/data/run/x" in str(error):
        assert "device: /data/run/x" in text


def test_places_without_room_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    free = {tmp_path: 5_000_000}
    usage = SimpleNamespace(disk_usage=lambda place: SimpleNamespace(free=free.get(place, 10**12)))
    monkeypatch.setattr(failures, "shutil", usage)
    assert failures._full_places() == [f"{tmp_path} (5 MB free)"]


def test_an_error_of_the_code_keeps_its_traceback() -> None:
    with pytest.raises(KeyError) as caught:
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise KeyError("a fault of the code")  # noqa: B904
    assert describe_system_error(caught.value) is None
    assert describe_system_error(ValueError("say what No space left on device means")) is None


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        (of_an_actor("RuntimeError: no engine may be given work"), "engine-0.rollout failed"),
        (
            ActorDiedError("The actor died: Worker exit detail: exit code 9"),
            "ended with exit code 9",
        ),
        (ValueError("Traceback\n  File 'x'\nValueError: cuda is gone"), "ValueError: cuda is gone"),
    ],
)
def test_a_death_inside_ray_train_is_a_panel_that_says_how_to_resume(
    cause: Exception, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = WorkerGroupError(cause)
    run: Any = SimpleNamespace(dir=Path("/shared/runs/night"))
    with pytest.raises(WorkerGroupError):
        with describe_resume(run):
            raise error
    monkeypatch.setenv("COLUMNS", "100")
    code, text = shown(error, monkeypatch, capsys)
    assert code == 1 and told in text
    assert "sleeprl night --resume /shared/runs/night\n" in text
    assert len(text.splitlines()) < 16


def test_a_name_that_is_too_long_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run_night(config: Any) -> Any:
        (tmp_path / ("x" * 300)).mkdir()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "run_night", run_night)
    monkeypatch.setattr(sys, "argv", ["sleeprl", "night", "resources.cpus=8"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "File name too long" in capsys.readouterr().err
