"""What a killed night leaves behind outside its directory, and how the next start clears it.

A process that makes such things holds a locked *marker* file as long as it lives, so that whoever
gets the lock knows that the owner is dead, also across containers that share a folder. Only what
bears sleepRL's name, is of this user and has a dead owner is removed.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path

_MARKER = ".sleeprl.lock"
_PREFIX = "sleeprl-"
SHM = Path("/dev/shm")
"""Where Linux keeps named semaphores."""
_markers: list[TextIOWrapper] = []
"""The markers of this process; they are locked until it ends."""


def mark(directory: Path) -> None:
    """Make a directory this process's own, to be cleared once the process is dead."""
    with suppress(OSError):
        marker = (directory / _MARKER).open("w", encoding="utf-8")
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _markers.append(marker)


def own_scratch() -> Path:
    """Make a directory for the sockets of this process, and name its semaphores after it.

    The processes that it starts inherit the name of the semaphores.

    Returns:
        The directory, below the temporary one. Its name is short: a socket's path may have 107 bytes.
    """
    scratch = Path(tempfile.gettempdir()) / f"{_PREFIX}{uuid.uuid4().hex[:8]}"
    scratch.mkdir(mode=0o700)
    mark(scratch)
    # ``multiprocessing`` has no public way to name them.
    config = getattr(multiprocessing.current_process(), "_config", None)
    if isinstance(config, dict):
        config["semprefix"] = f"/{scratch.name}"
    return scratch


def clear_leftovers(ray_sessions: Path) -> list[Path]:
    """Remove what dead processes of this user left.

    Args:
        ray_sessions: The directory of Ray's sessions on this machine.

    Returns:
        What was removed.
    """
    removed = []
    for directory in _abandoned(Path(tempfile.gettempdir()).glob(f"{_PREFIX}????????")):
        for semaphore in SHM.glob(f"sem.{directory.name}-*"):
            if semaphore.lstat().st_uid == os.getuid():
                semaphore.unlink(missing_ok=True)
                removed.append(semaphore)
        removed.append(directory)
        shutil.rmtree(directory, ignore_errors=True)
    for directory in _abandoned(ray_sessions.glob("session_2*")):
        shutil.rmtree(directory, ignore_errors=True)
        removed.append(directory)
    return removed


def _abandoned(directories: Iterator[Path]) -> Iterator[Path]:
    """Yield the marked directories of this user whose owners are dead, each locked meanwhile."""
    for directory in directories:
        with suppress(OSError):
            if directory.is_symlink() or directory.lstat().st_uid != os.getuid():
                continue
            with (directory / _MARKER).open("r+", encoding="utf-8") as marker:
                fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield directory
