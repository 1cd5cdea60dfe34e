"""What a machine must have for a night, and what it had better have: checked before anything starts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from sleeprl.cluster.failures import ray_temporary_directory
from sleeprl.config.schema import ConfigError, NightConfig

SOCKET_BYTES = 107
"""The longest path of a socket on Linux (AF_UNIX)."""
_IN_RAY = len("/ray/session_2026-12-31_23-59-59_999999_4194304/sockets/plasma_store")
SHM = Path("/dev/shm")
SHM_BYTES = 512 * 2**20
"""With less Ray keeps its objects in files, which is slow; a container has 64 MB by default."""
DISK_BYTES = 2**30
"""A night on the embedded model needs about a quarter of this."""


def refuse_unusable_places(config: NightConfig) -> None:
    """Refuse a temporary directory that Ray cannot use.

    Raises:
        ConfigError: The message names the setting or the variable, its value, and a fix.
    """
    if config.resources.address is not None:
        return  # that Ray has its directory
    temporary, name = ray_temporary_directory(), _temporary_variable()
    longest = SOCKET_BYTES - _IN_RAY
    if len(os.fsencode(temporary.absolute())) > longest:
        raise ConfigError(
            f"{name}={str(temporary)!r} is too long for Ray's sockets: a path below it may have "
            f"{SOCKET_BYTES} bytes (AF_UNIX), which leaves {longest}; set RAY_TMPDIR to a shorter one, "
            "for example RAY_TMPDIR=/tmp"
        )
    there = _existing_part(temporary)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{name}={str(temporary)!r}: nothing can be written there, and Ray needs it; set "
            "RAY_TMPDIR to another directory"
        )


def describe_scarce_places(config: NightConfig) -> list[str]:
    """Say which places have little room: a line for each."""
    lines = []
    shm = _free(SHM) if config.resources.address is None else None
    if shm is not None and shm < SHM_BYTES:
        lines.append(
            f"{SHM} has {shm / 1e6:.0f} MB free: Ray would keep its objects in files, which is slow. "
            "In a container start it with --shm-size=2g (Docker) or an emptyDir of medium Memory "
            "(Kubernetes)"
        )
    places = {"runs": Path(config.runs), "generations": Path(config.generations)}
    if config.resources.address is None:
        places[_temporary_variable()] = ray_temporary_directory()
    for key, path in places.items():
        free = _free(_existing_part(path))
        if free is not None and free < DISK_BYTES:
            lines.append(
                f"{key}={str(path)!r} has {free / 1e6:.0f} MB free; a night of a small model writes "
                "some hundred MB, of a large one several times its size"
            )
    return lines


def _temporary_variable() -> str:
    return "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"


def _existing_part(path: Path) -> Path:
    """Return the path, or the nearest directory above it that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _free(path: Path) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None
