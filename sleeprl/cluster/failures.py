"""What failed in an actor, in plain data, and its root cause on one screen. Imports no ray."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

TRACE_LINES, LOG_LINES, MESSAGE = 6, 6, 380  # lines, lines, characters
_QUIET = re.compile(r":(job_id|actor_name|task_name):")  # what Ray itself writes into a log
_NO_CODE = (
    "its process is gone, without an exit code: killed (out of memory?), crashed, or os._exit"
)


class FailureKind(StrEnum):
    """INFRA may be retried elsewhere; DATA is a fault of the work or of the code, and is loud."""

    INFRA = "infra"
    DATA = "data"


@dataclass(frozen=True)
class Failure:
    """A call that failed. Made on the actor's side: exception types are lost on the way.

    pid: of the process in which the root cause is; 0 where that is not known.
    """

    kind: FailureKind
    message: str
    trace: str = ""
    pid: int = 0


class ActorFailure(RuntimeError):
    """Raised where a failed call cannot be retried."""

    def __init__(self, where: str, failure: Failure) -> None:
        self.where, self.failure = where, failure
        super().__init__(
            f"{where} failed ({failure.kind}): {failure.message}\n{failure.trace}".rstrip()
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """It crosses processes: a job's worker raises it, the driver tells it."""
        return type(self), (self.where, self.failure)


def pid_in(text: str) -> int:
    """The process that one of Ray's messages is about, or 0."""
    found = re.search(r"\bpid[:=] ?(\d+)", text)
    return int(found.group(1)) if found else 0


def short_reason(message: str) -> str:
    """Ray's account of an actor's death, in one line."""
    detail = re.search(r"Worker exit detail: (.*)", message)
    if detail is None:
        return message.strip().partition("\n")[0]
    if "connection error code 2" in detail.group(1):
        return _NO_CODE
    code = re.search(r"exit code (-?\d+)", detail.group(1))
    return f"its process ended with exit code {code.group(1)}" if code else detail.group(1)


def failure_panel(error: BaseException) -> RenderableType | None:
    """Actor, reason, where it happened and the end of its log, in at most 25 lines of 100 columns;
    None for an error that is not an actor's."""
    found = next((each for each in _chain(error) if isinstance(each, ActorFailure)), None)
    if found is not None:
        where, failure = found.where, found.failure
    else:
        died = next((each for each in _chain(error) if hasattr(each, "actor_id")), None)
        if died is None:
            return None
        where, failure = (
            "an actor",
            Failure(FailureKind.INFRA, short_reason(str(died)), pid=pid_in(str(died))),
        )
    parts = [Text(" ".join(failure.message.split())[:MESSAGE], style="bold")]
    trace = failure.trace.strip().splitlines() if failure.kind is FailureKind.DATA else []
    if trace:
        parts += [Text(), *_lines(trace[-TRACE_LINES:])]
    path, log = log_tail(failure.pid)
    if log:
        parts += [Text(f"\nthe end of its log, {path}:", style="dim"), *_lines(log)]
    elif failure.pid:
        parts.append(Text(f"\nprocess {failure.pid} left no log on this host", style="dim"))
    return Panel(Group(*parts), title=f"{where} failed ({failure.kind})", border_style="red")


def log_tail(pid: int, lines: int = LOG_LINES) -> tuple[Path | None, list[str]]:
    """The last lines that a worker process on this host wrote, and the file they are in: what it
    wrote to stderr, or, where that is nothing, to stdout. The session that wrote last counts."""
    logs = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"
    for kind in ("err", "out"):
        files = list(logs.glob(f"session_2*/logs/worker-*-{pid}.{kind}")) if pid else []
        for path in sorted(files, key=lambda file: file.stat().st_mtime)[-1:]:
            text = path.read_text(errors="replace").splitlines()
            wrote = [line for line in text if line.strip() and not _QUIET.match(line)]
            if wrote:
                return path, wrote[-lines:]
    return None, []


def _lines(lines: list[str]) -> list[Text]:
    """One line each on the screen, whatever its length."""
    return [Text(line, no_wrap=True, overflow="ellipsis") for line in lines]


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those in which it has its cause: Python's, Ray's, and Ray Train's by worker."""
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        workers = getattr(each, "worker_failures", None) or {}
        causes = (getattr(each, "cause", None), each.__cause__, each.__context__, *workers.values())
        waiting += [cause for cause in causes if isinstance(cause, BaseException)]
