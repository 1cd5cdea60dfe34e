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

from rich import box
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from sleeprl.reporting.summary_view import RATES, Summary, figure, measured, percent, short

State = Literal["waiting", "running", "done", "failed", "skipped"]
_MARKS: dict[State, tuple[str, str]] = {
    "waiting": ("·", "dim"),
    "done": ("✓", "green"),
    "failed": ("✗", "bold red"),
    "skipped": ("↷", "dim"),
}


@dataclass
class _Phase:
    title: str
    state: State = "waiting"
    total: float | None = None
    completed: float = 0.0
    first: tuple[float, float] | None = None
    """What was completed when it was first told, and when that was."""
    started_s: float = 0.0
    ended_s: float | None = None
    note: str = ""
    metrics: dict[str, float | str] = field(default_factory=dict)

    def elapsed_s(self, now: float) -> float:
        return (now if self.ended_s is None else self.ended_s) - self.started_s

    def eta_s(self, now: float) -> float | None:
        """Seconds left at the pace since the first that was done, which starting up came before; None
        when that cannot be said."""
        done, began = self.first or (self.completed, now)
        if self.state != "running" or not self.total or self.completed <= done:
            return None
        left = max(0.0, self.total - self.completed)
        return (now - began) * left / (self.completed - done)

    def figures(self) -> str:
        """The latest metrics as one piece of text."""
        return "  ".join(
            f"{name} {value if isinstance(value, str) else short(value)}"
            for name, value in self.metrics.items()
        )

    def told(self) -> str:
        """The latest metrics and the note."""
        return "  ".join(part for part in (self.figures(), self.note) if part)


class NightProgress:
    """Shows the phases of a night while they run.

    On a terminal it is a live table; lines that others print or log appear above
    it. Elsewhere it prints one line when a phase starts or ends, and one at most
    every ``every_s`` seconds in between. Safe to update from several threads.

    Leaving the block with an exception marks the running phases as failed.
    """

    def __init__(
        self,
        phases: Sequence[tuple[str, str]],
        console: Console | None = None,
        *,
        every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``phases``: key and title of each, in order; ``clock`` is in seconds."""
        self._phases = {key: _Phase(title) for key, title in phases}
        self._console = console or Console()
        self._every_s, self._clock = every_s, clock
        self._began_s = self._last_line_s = clock()
        self._lock = threading.RLock()
        self._spinner = Spinner("dots", style="cyan")
        self._live = self._console.is_terminal
        self._display = ExitStack()

    def __enter__(self) -> Self:
        if self._live:
            live = Live(console=self._console, get_renderable=self._table, refresh_per_second=5)
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
        """The phase runs from now on; ``total`` is how much there is to complete."""
        with self._lock:
            phase = self._phases[key]
            phase.state, phase.total, phase.note = "running", total, note
            phase.completed, phase.started_s, phase.ended_s = 0.0, self._clock(), None
            phase.first = None
            self._say(phase, f"started{f', {note}' if note else ''}")

    def update(
        self,
        key: str,
        completed: float | None = None,
        total: float | None = None,
        **metrics: float | str,
    ) -> None:
        """``completed`` is done of the whole, also by an earlier attempt, and may be less than before
        where a worker was lost; ``metrics`` replace those of the same name."""
        with self._lock:
            phase = self._phases[key]
            if completed is not None:
                if phase.first is None or completed <= phase.completed:
                    phase.first = completed, self._clock()
                phase.completed = completed
            phase.total = phase.total if total is None else total
            phase.metrics |= metrics
            if self._clock() - self._last_line_s >= self._every_s:
                self._say(phase, _pace(phase, self._clock()))

    def finish(self, key: str, note: str = "") -> None:
        self._end(key, "done", note)

    def fail(self, key: str, error: BaseException | str) -> None:
        """The phase ended with ``error``, of which the first line is shown."""
        if isinstance(error, BaseException):
            error = f"{type(error).__name__}: {error}".rstrip(": ")
        self._end(key, "failed", error.partition("\n")[0])

    def skip(self, key: str, why: str) -> None:
        """The phase need not run, for instance because a resumed run has its result."""
        with self._lock:
            phase = self._phases[key]
            phase.state, phase.note = "skipped", why
            self._say(phase, f"skipped, {why}")

    def warn(self, text: str) -> None:
        """A line of its own, for what a user should know while it goes on."""
        with self._lock:
            since = _clock_text(self._clock() - self._began_s)
            self._console.print(
                f"[{since}] {text}", style="yellow", markup=False, highlight=False, soft_wrap=True
            )

    def _end(self, key: str, state: State, note: str) -> None:
        with self._lock:
            phase = self._phases[key]
            phase.state, phase.note, phase.ended_s = state, note, self._clock()
            verb = "done in" if state == "done" else "FAILED after"
            self._say(phase, f"{verb} {_clock_text(phase.elapsed_s(phase.ended_s))}", phase.told())

    def _say(self, phase: _Phase, *parts: str) -> None:
        """One plain line, unless the live table shows it anyway."""
        if self._live:
            return
        self._last_line_s = self._clock()
        since = _clock_text(self._last_line_s - self._began_s)
        text = "  ".join(part for part in parts if part)
        self._console.print(
            f"[{since}] {phase.title}: {text}", markup=False, highlight=False, soft_wrap=True
        )

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2), expand=True)
        for _ in range(4):
            table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        with self._lock:
            now = self._clock()
            for phase in self._phases.values():
                table.add_row(*self._row(phase, now))
        return table

    def _row(self, phase: _Phase, now: float) -> list[RenderableType]:
        running = phase.state == "running"
        mark, style = ("", "bold") if running else _MARKS[phase.state]
        bar: RenderableType = ""
        if running and phase.total and self._console.width >= 90:
            bar = ProgressBar(total=phase.total, completed=phase.completed, width=16)
        timed = running or phase.ended_s is not None
        elapsed = _clock_text(phase.elapsed_s(now)) if timed else ""
        eta = phase.eta_s(now)
        return [
            self._spinner if running else Text(mark, style),
            Text(phase.title, "dim" if phase.state in ("waiting", "skipped") else style),
            bar,
            Text(elapsed if eta is None else f"{elapsed} / {_clock_text(eta)} left", "cyan"),
            Text(phase.told(), "red" if phase.state == "failed" else "dim"),
        ]


def before_after_table(summary: Summary) -> Table:
    """The morning's figures for the terminal: rates with 95 % Wilson intervals in points."""
    shown = measured(summary)
    found = [figure(shown[-1][2], shown[-1][0], name) for name in RATES] if shown else []
    counts = " / ".join("-" if f is None or f.n is None else str(f.n) for f in found)
    table = Table(
        title="Before and after the night",
        title_justify="left",
        caption=f"95 % intervals; questions asked: {counts}",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    table.add_column("", no_wrap=True)
    for name in (*RATES.values(), "Perplexity"):
        table.add_column(name, justify="right", no_wrap=True)
    for state, label, where in shown:
        cells = [_rate_cell(where, state, name) for name in RATES]
        perplexity = figure(where, state, "perplexity")
        table.add_row(
            label,
            *cells,
            short(perplexity.value) if perplexity else "-",
            style="bold" if state == "after" else "",
        )
    return table


def _rate_cell(summary: Summary, state: str, name: str) -> str:
    found = figure(summary, state, name)
    if found is None:
        return "-"
    if found.interval is None:
        return percent(found.value)
    low, high = found.interval
    return f"{percent(found.value, 0)} ({100 * low:.0f}-{100 * high:.0f})"


def _pace(phase: _Phase, now: float) -> str:
    parts = [_clock_text(phase.elapsed_s(now))]
    if phase.total:
        parts.insert(0, f"{phase.completed:g}/{phase.total:g}")
    if (eta := phase.eta_s(now)) is not None:
        parts.append(f"{_clock_text(eta)} left")
    return "  ".join([", ".join(parts), phase.figures()]).rstrip()


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
