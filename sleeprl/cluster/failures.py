"""Describes a failed call to an actor as plain data, and shows its root cause. Imports no ray."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel

from sleeprl.utils.terminal_text import Text

TRACE_LINES, LOG_LINES = 6, 6
MESSAGE_CHARACTERS, LINE_CHARACTERS = 380, 180
_RAY_LINE = re.compile(r":(job_id|actor_name|task_name):")
"""What Ray itself writes into the log of a worker."""
_NO_EXIT_CODE = (
    "its process is gone, without an exit code: killed (out of memory?), crashed, or os._exit"
)


class FailureKind(StrEnum):
    """Whether the same call may succeed elsewhere."""

    RETRYABLE = "retryable"
    """A process or a machine failed."""
    FATAL = "fatal"
    """The work or the code is at fault, and so is everything unknown."""


@dataclass(frozen=True)
class Failure:
    """A call that failed. The actor's side makes it, because exception types are lost on the way."""

    kind: FailureKind
    message: str
    trace: str = ""
    """Traceback of the root cause."""
    pid: int = 0
    """Process in which the root cause is; 0 where that is not known."""


class ActorFailure(RuntimeError):
    """Raised where a failed call cannot be retried."""

    def __init__(self, where: str, failure: Failure) -> None:
        self.where, self.failure = where, failure
        super().__init__(
            f"{where} failed ({failure.kind}): {failure.message}\n{failure.trace}".rstrip()
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by its arguments: a job's worker raises it, the driver shows it."""
        return type(self), (self.where, self.failure)


_WRITE_ELSEWHERE = "name a place that you may write to: runs=..., generations=..., TMPDIR, HF_HOME"
_FREE = "free some space there, or name another place: runs=..., generations=..., TMPDIR"
_WAYS_OUT = {
    errno.ENOSPC: _FREE,
    errno.EDQUOT: _FREE,
    errno.EROFS: _WRITE_ELSEWHERE,
    errno.EACCES: f"it may not be read or written; change its mode, or {_WRITE_ELSEWHERE}",
    errno.EPERM: f"it may not be read or written; change its mode, or {_WRITE_ELSEWHERE}",
    errno.ENAMETOOLONG: "choose a shorter name or path",
    errno.EMFILE: "raise the limit of open files: ulimit -n 65536",
    errno.ENFILE: "the machine has too many open files",
    errno.ENOMEM: "free memory, or lower resources.engine_kv_cache_gb or model.max_length",
    errno.ENOENT: "give a path that exists",
    errno.EISDIR: "give a file, not a directory",
    errno.ENOTDIR: "a part of the path is a file; give another path",
    errno.EEXIST: "move it away, or choose another name",
    errno.EIO: "the disk or the network file system fails; look at the system's log",
}
"""What a person can do about an error of the system."""
_IN_WORDS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE)
_ERRORS_IN_WORDS = {os.strerror(number): number for number in _IN_WORDS}
"""Libraries pass on the words without the exception: safetensors, pyarrow, Ray. Those of other errors
are in the output of any program, a compiler's for example."""
_NEARLY_FULL = 64 * 2**20


def describe_system_error(error: BaseException) -> str | None:
    """Say in one line which error of the system is behind a failure, where, and what to do.

    Returns:
        The line; None where the failure is not of that kind, or where its kind is unknown.
    """
    for each in _chain(error, explicit=True):
        if isinstance(each, OSError) and each.errno is not None:
            number, where = each.errno, each.filename
            words = os.strerror(number) if number in _WAYS_OUT else str(each.strerror)
        else:
            lines = str(each).splitlines()
            found = next(
                ((w, n) for w, n in _ERRORS_IN_WORDS.items() if _has_error(lines, w)), None
            )
            if found is None:
                continue
            (words, number), where = found, _path_in(lines, found[0])
        parts = [words if where is None else f"{words}: {os.fsdecode(where)}"]
        if number in (errno.ENOSPC, errno.EDQUOT) and (full := _full_places()):
            parts.append(f"nearly full: {', '.join(full)}")
        if way := _WAYS_OUT.get(number):
            parts.append(way)
        return "; ".join(parts)
    return None


def _has_error(lines: list[str], words: str) -> bool:
    """Return whether a line is the system's error, and not a sentence with the same words."""
    sign = re.compile(rf"(\[Errno \d+\]|os error|Error|error).*{words}|{words} \(os error|^{words}")
    return any(sign.search(line) for line in lines)


def _path_in(lines: list[str], words: str) -> str | None:
    """Return the path behind the words, as Python writes it."""
    found = (re.search(rf"{words}: '([^']+)'", line) for line in lines)
    return next((each.group(1) for each in found if each), None)


def _full_places() -> list[str]:
    """Name the places where nights write that have hardly any room left."""
    places = (Path.cwd(), Path(tempfile.gettempdir()), Path("/dev/shm"), Path.home())
    full = []
    for place in dict.fromkeys(places):
        with suppress(OSError):
            free = shutil.disk_usage(place).free
            if free < _NEARLY_FULL:
                full.append(f"{place} ({free / 1e6:.0f} MB free)")
    return full


def pid_in(text: str) -> int:
    """Return the process that one of Ray's messages is about, or 0."""
    found = re.search(r"\bpid[:=] ?(\d+)", text)
    return int(found.group(1)) if found else 0


def short_reason(message: str) -> str:
    """Return Ray's account of an actor's death in one line."""
    detail = re.search(r"Worker exit detail: (.*)", message)
    if detail is None:
        return message.strip().partition("\n")[0]
    if "connection error code 2" in detail.group(1):
        return _NO_EXIT_CODE
    code = re.search(r"exit code (-?\d+)", detail.group(1))
    return f"its process ended with exit code {code.group(1)}" if code else detail.group(1)


def failure_panel(error: BaseException) -> RenderableType | None:
    """Return which actor failed, why, where in the code, and the end of its log.

    What does not fit into a line is wrapped. Returns None for an error that is not an actor's.
    """
    found = _find_failure(error)
    if found is None:
        return None
    where, failure = found
    message = textwrap.shorten(failure.message, MESSAGE_CHARACTERS, placeholder=" …")
    parts = [Text(message, style="bold", overflow="fold")]
    trace = failure.trace.strip().splitlines() if failure.kind is FailureKind.FATAL else []
    if trace:
        parts += [Text(), *_lines(trace[-TRACE_LINES:])]
    path, log = log_tail(failure.pid)
    if log:
        header = Text(f"\nthe end of its log, {path}:", style="dim", overflow="fold")
        parts += [header, *_lines(log)]
    elif failure.pid:
        parts.append(Text(f"\nprocess {failure.pid} left no log on this host", style="dim"))
    title = Text(f"{where} failed ({failure.kind})")
    return Panel(Group(*parts), title=title, border_style="red")


def _find_failure(error: BaseException) -> tuple[str, Failure] | None:
    """Return the actor and its failure among an error and its causes."""
    errors = list(_chain(error))
    for each in errors:
        if isinstance(each, ActorFailure):
            return each.where, each.failure
    for each in errors:
        if workers := getattr(each, "worker_failures", None):  # Ray Train's
            rank, cause = next(iter(workers.items()))
            lines = str(cause).strip().splitlines() or [type(cause).__name__]
            kind = FailureKind.RETRYABLE if hasattr(cause, "actor_id") else FailureKind.FATAL
            message = short_reason(str(cause)) if kind is FailureKind.RETRYABLE else lines[-1]
            return f"worker {rank} of the training job", Failure(
                kind, message, "\n".join(lines), pid_in(str(cause))
            )
    for each in errors:
        if hasattr(each, "actor_id"):  # Ray's own error of a dead actor
            reason, pid = short_reason(str(each)), pid_in(str(each))
            return "an actor", Failure(FailureKind.RETRYABLE, reason, pid=pid)
    return None


def ray_temporary_directory() -> Path:
    """Return the directory below which a Ray of this machine puts its sessions, as Ray finds it."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")


def log_tail(pid: int, lines: int = LOG_LINES) -> tuple[Path | None, list[str]]:
    """Return the file and the last lines of a worker process on this host.

    They are what it wrote to stderr or, where that is nothing, to stdout, in the newest session.
    """
    logs = ray_temporary_directory() / "ray"
    for kind in ("err", "out"):
        files = list(logs.glob(f"session_2*/logs/worker-*-{pid}.{kind}")) if pid else []
        for path in sorted(files, key=lambda file: file.stat().st_mtime)[-1:]:
            text = path.read_text(encoding="utf-8", errors="replace").splitlines()
            written = [line for line in text if line.strip() and not _RAY_LINE.match(line)]
            if written:
                return path, written[-lines:]
    return None, []


def _lines(lines: list[str]) -> list[Text]:
    """Make lines that wrap; a longer one than two of a usual terminal is cut."""
    cut = [f"{line[:LINE_CHARACTERS]} …" if len(line) > LINE_CHARACTERS else line for line in lines]
    return [Text(line, overflow="fold") for line in cut]


def _chain(error: BaseException, *, explicit: bool = False) -> Iterator[BaseException]:
    """Yield an error and its causes: Python's, Ray's, and Ray Train's by worker.

    With ``explicit`` leave out what was being handled when another error came.
    """
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        workers = getattr(each, "worker_failures", None) or {}
        context = None if explicit else each.__context__
        causes = (
            getattr(each, "cause", None),
            getattr(each, "controller_failure", None),
            getattr(each, "_base_exc", None),  # Ray Train's wrapper of a worker's exception
            each.__cause__,
            context,
            *workers.values(),
        )
        waiting += [cause for cause in causes if isinstance(cause, BaseException)]
