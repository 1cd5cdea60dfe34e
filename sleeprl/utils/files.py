"""Atomic files: a reader sees a file whole or not at all.

Everything is written under a hidden sibling name (``.NAME.HEX.tmp``), flushed to disk and renamed.
A process that is killed at any instant leaves the old state readable, and at worst a hidden
leftover, which no reader of sleepRL looks at.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling to write; on success it replaces ``path``, on error it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path)
    try:
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(final_dir: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling directory to fill; on success it becomes ``final_dir``.

    With ``overwrite`` the old directory is moved aside first, so there is one instant (between two
    renames) in which only the hidden sibling has its content.

    Args:
        final_dir: The directory to create.
        overwrite: Whether to replace an existing one.

    Raises:
        FileExistsError: ``final_dir`` exists and ``overwrite`` is False.
    """
    final = Path(final_dir)

    def refuse() -> None:
        if final.exists() and not overwrite:
            raise FileExistsError(f"{final} exists; remove it or choose another directory")

    refuse()
    temporary, old = _sibling(final), _sibling(final)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for entry in temporary.rglob("*"):
            _fsync(entry)
        _fsync(temporary)
        refuse()  # another process may have created it meanwhile
        if final.exists():
            os.rename(final, old)
        try:
            os.rename(temporary, final)
        except OSError:
            if old.exists():
                os.rename(old, final)
            raise
        _fsync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def leftovers(parent: Path, name: str) -> list[Path]:
    """List the directories that killed calls of ``atomic_directory`` left beside ``parent / name``.

    Args:
        parent: Their directory.
        name: Pattern of the names of the final directories, as a regular expression.
    """
    own = re.compile(rf"\.(?:{name})\.[0-9a-f]{{32}}\.tmp")
    return [
        path
        for path in parent.glob(".*.tmp")
        if own.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write UTF-8 text; a reader sees the old text or the new one, never a part."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write standard JSON.

    Paths become strings and numpy scalars become numbers. JSON has no NaN or infinity, so those
    become null.
    """
    text = json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_text_atomic(path, text + "\n")


class DamagedFile(ValueError):
    """A file that cannot be read as what it must be; the message names it."""


def read_json(path: str | Path) -> Any:
    """Read a file that sleepRL wrote as JSON.

    Raises:
        DamagedFile: It is not UTF-8 or not JSON; the message names it.
        OSError: It cannot be opened; the message names it.
    """
    path = Path(path)
    try:
        return json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise DamagedFile(
            f"{path} is damaged: {reason}; restore it from a copy, or remove what it belongs to"
        ) from None


def read_record(path: str | Path, build: Callable[[Any], T]) -> T:
    """Read a JSON file and build what it holds.

    Args:
        path: The file.
        build: Makes the record of the file's content.

    Raises:
        DamagedFile: The file is not JSON, or its content is not what is built from; the message
            names it.
    """
    values = read_json(path)
    try:
        return build(values)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DamagedFile(
            f"{path} is damaged: it does not hold what sleepRL writes there ({error!r}); restore it "
            "from a copy, or remove what it belongs to"
        ) from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "shape", None) == ():  # a numpy or torch scalar
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def apply_umask(path: str | Path) -> None:
    """Give a file the permissions of a newly created one, whatever its writer chose."""
    path = Path(path)
    probe = _sibling(path)
    probe.touch()  # the umask itself can only be read by setting it, for all threads
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    path.chmod(mode)


def sha256_file(path: str | Path) -> str:
    """Compute the hexadecimal SHA-256 of a file, without reading it into memory at once."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Lock the file ``path`` exclusively; the system releases the lock if the process dies."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
