"""What a killed night left is cleared by the next start, and nothing else is."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sleeprl.utils import leftovers
from sleeprl.utils.leftovers import clear_leftovers

OWNER = """
import multiprocessing, sys
from pathlib import Path
from sleeprl.utils.leftovers import mark, own_scratch

sessions, shm = map(Path, sys.argv[1:])
session = sessions / "session_2026-01-01_00-00-00_000000_77"
session.mkdir(parents=True)
mark(session)
scratch = own_scratch()
(scratch / "socket").touch()
from multiprocessing.synchronize import SemLock
(shm / f"sem.{SemLock._make_name()[1:]}").touch()
print(scratch.name, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Path]:
    """The temporary directory, Ray's sessions, and the semaphores."""
    tmp, sessions, shm = tmp_path / "tmp", tmp_path / "tmp" / "ray", tmp_path / "shm"
    sessions.mkdir(parents=True)
    shm.mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp))
    monkeypatch.setattr(leftovers, "SHM", shm)
    return tmp, sessions, shm


@pytest.fixture
def owner(places: tuple[Path, Path, Path]) -> Iterator[subprocess.Popen[str]]:
    _, sessions, shm = places
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, sessions, shm],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline().startswith("sleeprl-")
        yield process
        process.kill()


def test_what_a_live_process_uses_stays_and_what_a_killed_one_left_goes(
    places: tuple[Path, Path, Path], owner: subprocess.Popen[str]
) -> None:
    tmp, sessions, shm = places
    others = [
        tmp / "sleeprl-notes", tmp / "sleeprl-12345678", tmp / "8c6a-socket", tmp / "ray-own",
        sessions / "session_2025-01-01_00-00-00_000000_1",  # of another program
        shm / "sem.mp-abcdefgh", shm / "sem.sleeprl-12345678-x",
    ]  # fmt: skip
    for other in others:
        other.mkdir()
    (tmp / "sleeprl-87654321").symlink_to(tmp_target := tmp / "target")
    tmp_target.mkdir()
    (tmp_target / ".sleeprl.lock").touch()
    assert clear_leftovers(sessions) == []
    owner.kill()
    owner.wait()
    removed = clear_leftovers(sessions)
    assert [path.name.partition("-")[0] for path in removed] == [
        "sem.sleeprl", "sleeprl", "session_2026"
    ]  # fmt: skip
    assert not any(path.exists() for path in removed)
    assert all(other.exists() for other in [*others, tmp_target])
    assert clear_leftovers(sessions) == []
