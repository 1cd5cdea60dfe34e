"""Records every wait: who waits for which target, since when and why.

Idle seconds add up by waiter and kind of wait, and a watchdog names the waits that have stalled.
``WAITS`` are those of this process; an ``ActorGroup`` records its calls there by itself.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self, get_args

from sleeprl.utils.terminal_text import show

WaitKind = Literal["generate", "sync", "data", "gate", "train", "score", "start"]
WAIT_KINDS: tuple[WaitKind, ...] = get_args(WaitKind)

_FOR: dict[WaitKind, str] = {
    "generate": "generation by",
    "sync": "a weight update with",
    "data": "data from",
    "gate": "the gate of",
    "train": "training by",
    "score": "scores from",
    "start": "the start of",
}
_log = logging.getLogger(__name__)


LogTail = Callable[[], list[str]]


def _no_lines() -> list[str]:
    return []


@dataclass(frozen=True, eq=False)
class Wait:
    """One wait that is going on."""

    waiter: str
    target: str
    """What is waited for: an actor or a process."""
    what: str
    """What it is to deliver."""
    kind: WaitKind
    since: float
    """In seconds of the clock of its ``Waits``."""
    log_tail: LogTail = _no_lines
    """Returns the last lines that the target wrote."""

    def describe(self, now: float) -> str:
        """Write it as 'learner has waited 62 s for data from engine-0: batch 12'."""
        waited_s = f"{now - self.since:.0f} s"
        return (
            f"{self.waiter} has waited {waited_s} for {_FOR[self.kind]} {self.target}: {self.what}"
        )


class Waits:
    """Keeps the waits of one process.

    Guarantees:
        * Every second of a waiter is attributed at most once. Where its waits overlap, as in
          concurrent tasks of one driver, a second belongs to the one that began first. So a
          waiter's idle time never exceeds the time that passed.
        * It is safe to use from several threads.

    A task whose idleness is of interest by itself is a waiter of its own. In async code, put the plain
    ``with`` around the ``await``:
    ``with waits.on("engine-0", what="batch 3", kind="generate"): await reply``.
    """

    def __init__(
        self, waiter: str = "driver", *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start without waits.

        Args:
            waiter: Name of this process, which waits where no other waiter is given.
            clock: Returns seconds.
        """
        self.clock = clock
        self.waiter = waiter
        self._lock = threading.Lock()
        self._open: dict[str, list[Wait]] = defaultdict(list)
        self._polled: set[Wait] = set()
        self._credited_at: dict[str, float] = {}
        self._idle: dict[str, dict[WaitKind, float]] = defaultdict(lambda: defaultdict(float))
        self._totals: dict[WaitKind, float] = defaultdict(float)

    @contextmanager
    def on(
        self,
        target: str,
        *,
        what: str,
        kind: WaitKind,
        waiter: str | None = None,
        log_tail: LogTail = _no_lines,
    ) -> Iterator[Wait]:
        """Record that ``waiter`` waits for ``target`` as long as the block lasts.

        Raises:
            ValueError: There is no such kind of wait.
        """
        if kind not in WAIT_KINDS:
            raise ValueError(f"kind of wait {kind!r} is unknown; use one of {WAIT_KINDS}")
        waiter = waiter or self.waiter
        with self._lock:
            wait = Wait(waiter, target, what, kind, self._credit_idle(waiter), log_tail)
            self._open[waiter].append(wait)
        try:
            yield wait
        finally:
            with self._lock:
                self._credit_idle(waiter)
                self._open[waiter].remove(wait)

    def set_target(
        self,
        waiter: str,
        target: str | None,
        *,
        what: str = "",
        kind: WaitKind = "data",
        log_tail: LogTail = _no_lines,
    ) -> None:
        """Record that ``waiter`` waits for ``target`` from now on, or for nothing where it is None.

        For a loop that polls instead of blocking. Recording the same target again changes nothing.
        """
        with self._lock:
            open_ = next((w for w in self._open[waiter] if w in self._polled), None)
            if open_ is not None and (open_.target, open_.kind) == (target, kind):
                return
            since = self._credit_idle(waiter)
            if open_ is not None:
                self._open[waiter].remove(open_)
                self._polled.remove(open_)
            if target is not None:
                wait = Wait(waiter, target, what, kind, since, log_tail)
                self._open[waiter].append(wait)
                self._polled.add(wait)

    def current(self) -> list[Wait]:
        """Return the waits going on now, oldest first."""
        with self._lock:
            return sorted((w for ws in self._open.values() for w in ws), key=lambda w: w.since)

    def idle(self) -> dict[str, dict[str, float]]:
        """Return idle seconds by waiter and kind so far, with those of the waits going on.

        This is the layout of ``idle`` in ``summary.json``.
        """
        with self._lock:
            for waiter in self._open:
                self._credit_idle(waiter)
            return {waiter: {str(k): s for k, s in of.items()} for waiter, of in self._idle.items()}

    def total(self, kind: WaitKind) -> float:
        """Return idle seconds of one kind, of all waiters together. ``take_idle`` resets none of it."""
        with self._lock:
            for waiter in self._open:
                self._credit_idle(waiter)
            return self._totals[kind]

    def take_idle(self) -> dict[str, dict[str, float]]:
        """Return ``idle()`` and reset it to zero."""
        found = self.idle()
        with self._lock:
            self._idle.clear()
        return found

    def _credit_idle(self, waiter: str) -> float:
        """Credit the time since the last call to the waiter's oldest wait; return the time in s."""
        now = self.clock()
        if self._open[waiter]:
            kind, passed = self._open[waiter][0].kind, now - self._credited_at[waiter]
            self._idle[waiter][kind] += passed
            self._totals[kind] += passed
        self._credited_at[waiter] = now
        return now


WAITS = Waits()


def to_stderr(message: str) -> None:
    print(show(message), file=sys.stderr, flush=True)


class Watchdog:
    """Reports a wait that has stalled: once at the limit, then each time its length doubles.

    ``on_stall`` gets one readable message. Where the target waits itself, the message follows the
    chain and says whether it closes. Below it are the last lines that the end of the chain wrote.
    """

    def __init__(
        self,
        waits: Waits,
        limit_s: float,
        on_stall: Callable[[str], None] = to_stderr,
        every_s: float = 1.0,
    ) -> None:
        """``limit_s``: a longer wait is a stall; ``every_s``: how often the thread looks."""
        if limit_s <= 0 or every_s <= 0:
            raise ValueError(f"limit_s={limit_s} and every_s={every_s} must be positive seconds")
        self._waits, self._limit_s, self._on_stall = waits, limit_s, on_stall
        self._every_s = every_s
        self._report_at_s: dict[Wait, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="wait-watchdog", daemon=True)

    def check(self, now: float) -> list[str]:
        """Report the stalls at clock time ``now``; returns the messages of this call."""
        current = self._waits.current()
        self._report_at_s = {w: self._report_at_s.get(w, self._limit_s) for w in current}
        messages = []
        for wait in current:
            waited_s = now - wait.since
            if waited_s >= self._report_at_s[wait]:
                self._report_at_s[wait] = 2 * waited_s
                message, last = _chain(wait, current, now)
                log_tail = [f"  {line}" for line in last.log_tail()]
                messages.append("\n".join([message, *log_tail]))
        for message in messages:
            self._on_stall(message)
        return messages

    def _watch(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                self.check(self._waits.clock())
            except Exception:  # a failing callback must not end the watch
                _log.exception("the wait watchdog could not report a stall")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()


def _chain(wait: Wait, current: list[Wait], now: float) -> tuple[str, Wait]:
    """Return who waits for what, along the chain, in one sentence; and the last wait of it."""
    message, seen = wait.describe(now), {wait.waiter}
    while True:
        following = next((w for w in current if w.waiter == wait.target), None)
        if following is None:
            return message, wait
        if following.waiter in seen:
            return f"{message}; they wait for each other", wait
        seen.add(following.waiter)
        message += f"; {following.describe(now)}"
        wait = following
