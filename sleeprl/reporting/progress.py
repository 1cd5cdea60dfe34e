"""The live display of a night: one line per phase, plain lines where there is no terminal."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.spinner import Spinner
from rich.table import Table

from sleeprl.reporting.summary_view import format_number
from sleeprl.reporting.terminal import GAP, Flow, make_console
from sleeprl.utils.terminal_text import AnyText, Text

State = Literal["waiting", "running", "done", "failed", "skipped"]
_MARKS: dict[State, tuple[str, str]] = {
    "waiting": ("·", "dim"),
    "done": ("✓", "green"),
    "failed": ("✗", "bold red"),
    "skipped": ("↷", "dim"),
}
_TITLE_WIDTH = 34
"""Columns of the longest title that is not wrapped."""
_TIME_WIDTH = 7
"""Columns of an elapsed time below a hundred hours, such as ``1:02:03``."""
_DETAILS_WIDTH = 30
"""Columns that details need beside the time; with fewer they stand below the title."""
_BAR_WIDTH = 16


@dataclass
class _Phase:
    title: str
    state: State = "waiting"
    total: float | None = None
    completed: float = 0.0
    first_count: tuple[float, float] | None = None
    """How much was completed when it was first reported, and at what time."""
    started_s: float = 0.0
    ended_s: float | None = None
    note: str = ""
    metrics: dict[str, float | str] = field(default_factory=dict)

    def elapsed_s(self, now: float) -> float:
        return (now if self.ended_s is None else self.ended_s) - self.started_s

    def eta_s(self, now: float) -> float | None:
        """Return the seconds left at the pace since the first report, or None without a pace.

        The time before the first report was spent on starting up, and is no measure of the pace.
        """
        done, began = self.first_count or (self.completed, now)
        if self.state != "running" or not self.total or self.completed <= done:
            return None
        left = max(0.0, self.total - self.completed)
        return (now - began) * left / (self.completed - done)

    def count(self) -> str:
        """Return how much is completed of how much, or an empty string without a total."""
        return f"{self.completed:g}/{self.total:g}" if self.total else ""

    def metric_items(self) -> list[str]:
        """Return the latest metrics, each as its name and value."""
        return [
            f"{name} {value if isinstance(value, str) else format_number(value)}"
            for name, value in self.metrics.items()
        ]


class NightProgress:
    """Shows the phases of a night while they run.

    On a terminal, a phase that has ended is a line that stays, and what runs and waits is a live
    display below; lines that others print or log appear above it. Elsewhere it prints one line when
    a phase starts or ends, and one at most every ``every_s`` seconds in between.

    Guarantees:
        * Nothing is cut off at any width: what does not fit is wrapped.
        * Titles, notes and metrics are data: markup in them is printed as it is.
        * Safe to update from several threads.
        * Leaving the block with an exception marks the running phases as failed.
    """

    def __init__(
        self,
        phases: Sequence[tuple[str, str]],
        console: Console | None = None,
        *,
        every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the display of a night.

        Args:
            phases: Key and title of each phase, in order.
            console: Where to print; by default the standard output.
            every_s: Seconds between two plain lines of a running phase.
            clock: Returns seconds.
        """
        self._phases = {key: _Phase(title) for key, title in phases}
        self._console = console or make_console()
        self._every_s, self._clock = every_s, clock
        self._began_s = self._last_line_s = clock()
        self._lock = threading.RLock()
        self._spinner = Spinner("dots", style="cyan")
        self._live = self._console.is_interactive
        self._display = ExitStack()

    def __enter__(self) -> Self:
        if self._live:
            live = Live(
                console=self._console, get_renderable=self._live_lines, refresh_per_second=5
            )
            self._display.enter_context(live)
            self._display.enter_context(_logging_follows_redirection())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is not None:
                for key in [k for k, p in self._phases.items() if p.state == "running"]:
                    self.fail(key, error)
        finally:
            self._display.close()

    def start(self, key: str, total: float | None = None, note: str = "") -> None:
        """Show a phase as running from now on; ``total`` is how much there is to complete."""
        with self._lock:
            phase = self._phases[key]
            phase.state, phase.total, phase.note = "running", total, note
            phase.completed, phase.started_s, phase.ended_s = 0.0, self._clock(), None
            phase.first_count = None
            self._print_plain(phase, f"started{f', {note}' if note else ''}")

    def update(
        self,
        key: str,
        completed: float | None = None,
        total: float | None = None,
        **metrics: float | str,
    ) -> None:
        """Show how far a phase is.

        Args:
            key: Key of the phase.
            completed: How much of the whole is done, also by an earlier attempt. It may be less
                than before, where a worker was lost.
            total: How much there is to complete, where that is news.
            metrics: Latest values; they replace those of the same name.
        """
        with self._lock:
            phase = self._phases[key]
            if completed is not None:
                if phase.first_count is None or completed <= phase.completed:
                    phase.first_count = completed, self._clock()
                phase.completed = completed
            phase.total = phase.total if total is None else total
            phase.metrics |= metrics
            if self._clock() - self._last_line_s >= self._every_s:
                self._print_plain(phase, self._pace(phase), *phase.metric_items())

    def finish(self, key: str, note: str = "") -> None:
        """Show a phase as done."""
        self._end(key, "done", note)

    def fail(self, key: str, error: BaseException | str) -> None:
        """Show a phase as failed, with the first line of the error."""
        if isinstance(error, BaseException):
            error = f"{type(error).__name__}: {error}".rstrip(": ")
        self._end(key, "failed", error.partition("\n")[0])

    def skip(self, key: str, why: str) -> None:
        """Show that a phase need not run, for instance because a resumed run has its result."""
        with self._lock:
            phase = self._phases[key]
            phase.state, phase.note = "skipped", why
            if self._live:
                self._console.print(self._row(phase))
            self._print_plain(phase, f"skipped, {why}")

    def warn(self, text: str) -> None:
        """Print a line of its own, for what a user should know while the night goes on."""
        with self._lock:
            since = _clock_text(self._clock() - self._began_s)
            self._console.print(
                f"[{since}] {text}",
                style="yellow",
                markup=False,
                highlight=False,
                soft_wrap=not self._live,
            )

    def _end(self, key: str, state: State, note: str) -> None:
        with self._lock:
            phase = self._phases[key]
            phase.state, phase.note, phase.ended_s = state, note, self._clock()
            if self._live:
                self._console.print(self._row(phase))
            verb = "done in" if state == "done" else "FAILED after"
            elapsed = _clock_text(phase.elapsed_s(phase.ended_s))
            self._print_plain(phase, f"{verb} {elapsed}", *phase.metric_items(), phase.note)

    def _print_plain(self, phase: _Phase, *parts: str) -> None:
        """Print one plain line, unless there is a live display."""
        if self._live:
            return
        self._last_line_s = self._clock()
        since = _clock_text(self._last_line_s - self._began_s)
        text = GAP.join(part for part in parts if part)
        self._console.print(
            f"[{since}] {phase.title}: {text}", markup=False, highlight=False, soft_wrap=True
        )

    def _pace(self, phase: _Phase) -> str:
        now = self._clock()
        parts = [phase.count(), _clock_text(phase.elapsed_s(now))]
        if (eta := phase.eta_s(now)) is not None:
            parts.append(f"{_clock_text(eta)} left")
        return ", ".join(part for part in parts if part)

    # --- the live display -----------------------------------------------------------

    def _live_lines(self) -> RenderableType:
        """Return the phases that run and, as far as the terminal is high enough, those that wait."""
        with self._lock:
            running = [self._row(p) for p in self._phases.values() if p.state == "running"]
            waiting = [p for p in self._phases.values() if p.state == "waiting"]
            # A running phase may take four lines. What is taller than the terminal cannot be redrawn.
            if len(waiting) + 4 * len(running) < self._console.height:
                return Group(*running, *map(self._row, waiting))
            return Group(*running, Text(f"· {len(waiting)} phases to come", "dim"))

    def _row(self, phase: _Phase) -> RenderableType:
        """Return a phase's line, with its details beside it or, on a narrow terminal, below."""
        running = phase.state == "running"
        mark, style = ("", "bold") if running else _MARKS[phase.state]
        dim = phase.state in ("waiting", "skipped")
        timed = running or phase.ended_s is not None
        elapsed = _clock_text(phase.elapsed_s(self._clock())) if timed else ""
        details = self._details(phase)
        width = self._title_width()
        beside = self._console.width - width - _TIME_WIDTH - 7 >= _DETAILS_WIDTH
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=1)
        table.add_column(width=width, overflow="fold")
        table.add_column(min_width=_TIME_WIDTH, justify="right", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row(
            self._spinner if running else Text(mark, style),
            Text(phase.title, "dim" if dim else style),
            Text(elapsed, "cyan"),
            details if beside else "",
        )
        if beside or not details.items:
            return table
        return Group(table, Padding(details, (0, 0, 0, 3)))

    def _title_width(self) -> int:
        longest = max((Text(p.title).cell_len for p in self._phases.values()), default=0)
        return max(1, min(longest, _TITLE_WIDTH, self._console.width - _TIME_WIDTH - 6))

    def _details(self, phase: _Phase) -> Flow:
        """Return the pace, the metrics and the note of a phase."""
        style = "red" if phase.state == "failed" else "dim"
        items: list[str | AnyText] = [*phase.metric_items(), *phase.note.split(GAP)]
        if phase.state == "running":
            eta = phase.eta_s(self._clock())
            left = "" if eta is None else f"{_clock_text(eta)} left"
            bar = _bar(phase.completed / phase.total) if phase.total else ""
            items = [bar, Text(phase.count(), "cyan"), Text(left, "cyan"), *items]
        return Flow.of(items, style)


def _bar(share: float) -> AnyText:
    done = round(_BAR_WIDTH * min(1.0, max(0.0, share)))
    return Text.assemble(("━" * done, "cyan"), ("━" * (_BAR_WIDTH - done), "bright_black"))


def _clock_text(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def _logging_follows_redirection() -> Iterator[None]:
    """Let log handlers made before the live display write above it instead of through it.

    ``Live`` replaces ``sys.stdout`` and ``sys.stderr``, but a handler keeps the
    stream that it was made with.
    """
    made = logging.root.manager.loggerDict.values()
    loggers = [logging.root, *(known for known in made if isinstance(known, logging.Logger))]
    moved = []
    for handler in {h for logger in loggers for h in logger.handlers}:
        if isinstance(handler, logging.StreamHandler):
            stream = handler.stream
            if stream is sys.__stderr__ or stream is sys.__stdout__:
                handler.setStream(sys.stderr if stream is sys.__stderr__ else sys.stdout)
                moved.append((handler, stream))
    try:
        yield
    finally:
        for handler, stream in moved:
            handler.setStream(stream)
