"""The one helper through which every wait goes.

It knows at any moment who waits for whom since when, adds up idle seconds per
waiter and kind of wait, and lets a watchdog say in words which wait has stalled.
``WAITS`` are this process's; calls of an ``ActorGroup`` are in it by themselves.
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


def _nothing() -> list[str]:
    return []


@dataclass(frozen=True, eq=False)
class Wait:
    """One wait that is going on. ``since`` is in seconds of the clock of its ``Waits``. wrote: the
    last lines of who is waited for."""

    waiter: str
    whom: str
    what: str
    kind: WaitKind
    since: float
    log_tail: LogTail = _nothing

    def describe(self, now: float) -> str:
        """'learner has waited 62 s for data from engine-0: batch 12'."""
        waited_s = f"{now - self.since:.0f} s"
        return f"{self.waiter} has waited {waited_s} for {_FOR[self.kind]} {self.whom}: {self.what}"


class Waits:
    """The waits of one process.

    Invariant: every second of a waiter is attributed at most once. While several of
    its waits overlap, as in concurrent tasks of one driver, the second belongs to
    the one that began first, so that a waiter's idle time never exceeds the time
    that went by. A task whose idleness is of interest by itself is its own waiter.

    Safe to use from several threads. In async code, put the plain ``with`` around
    the ``await``: ``with waits.on("engine-0", what="batch 3", kind="generate"): await reply``.
    """

    def __init__(
        self, waiter: str = "driver", *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``waiter``: this process, who waits when ``on`` does not say; ``clock`` is in seconds."""
        self.clock = clock
        self.waiter = waiter
        self._lock = threading.Lock()
        self._open: dict[str, list[Wait]] = defaultdict(list)
        self._looked: set[Wait] = set()
        self._settled_at: dict[str, float] = {}
        self._idle: dict[str, dict[WaitKind, float]] = defaultdict(lambda: defaultdict(float))
        self._totals: dict[WaitKind, float] = defaultdict(float)

    @contextmanager
    def on(
        self,
        whom: str,
        *,
        what: str,
        kind: WaitKind,
        waiter: str | None = None,
        log_tail: LogTail = _nothing,
    ) -> Iterator[Wait]:
        """Everything in the block is ``waiter`` waiting for ``whom`` because of ``what``."""
        if kind not in WAIT_KINDS:
            raise ValueError(f"kind of wait {kind!r} is unknown; use one of {WAIT_KINDS}")
        waiter = waiter or self.waiter
        with self._lock:
            wait = Wait(waiter, whom, what, kind, self._settle(waiter), log_tail)
            self._open[waiter].append(wait)
        try:
            yield wait
        finally:
            with self._lock:
                self._settle(waiter)
                self._open[waiter].remove(wait)

    def now(
        self,
        waiter: str,
        whom: str | None,
        *,
        what: str = "",
        kind: WaitKind = "data",
        log_tail: LogTail = _nothing,
    ) -> None:
        """For a loop that looks instead of blocking: from now on ``waiter`` waits for ``whom``, or,
        with None, for nobody. Saying the same again changes nothing."""
        with self._lock:
            open_ = next((w for w in self._open[waiter] if w in self._looked), None)
            if open_ is not None and (open_.whom, open_.kind) == (whom, kind):
                return
            since = self._settle(waiter)
            if open_ is not None:
                self._open[waiter].remove(open_)
                self._looked.remove(open_)
            if whom is not None:
                wait = Wait(waiter, whom, what, kind, since, log_tail)
                self._open[waiter].append(wait)
                self._looked.add(wait)

    def current(self) -> list[Wait]:
        """The waits going on now, oldest first."""
        with self._lock:
            return sorted((w for ws in self._open.values() for w in ws), key=lambda w: w.since)

    def idle(self) -> dict[str, dict[str, float]]:
        """Idle seconds per waiter and kind so far, those of open waits included.

        This is the layout of ``idle`` in ``summary.json``.
        """
        with self._lock:
            for waiter in self._open:
                self._settle(waiter)
            return {waiter: {str(k): s for k, s in of.items()} for waiter, of in self._idle.items()}

    def total(self, kind: WaitKind) -> float:
        """Idle seconds of one kind so far, of all waiters together, whatever ``lap`` has told."""
        with self._lock:
            for waiter in self._open:
                self._settle(waiter)
            return self._totals[kind]

    def lap(self) -> dict[str, dict[str, float]]:
        """Idle seconds since the last lap, as ``idle`` tells them, which then begins anew."""
        found = self.idle()
        with self._lock:
            self._idle.clear()
        return found

    def _settle(self, waiter: str) -> float:
        """Credit the time since the last call to the oldest open wait; returns now (s)."""
        now = self.clock()
        if self._open[waiter]:
            kind, passed = self._open[waiter][0].kind, now - self._settled_at[waiter]
            self._idle[waiter][kind] += passed
            self._totals[kind] += passed
        self._settled_at[waiter] = now
        return now


WAITS = Waits()


def to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class Watchdog:
    """Says which wait has stalled: once at the limit, then each time its length doubles.

    ``on_stall`` gets one readable message, which follows the chain when the one
    waited for is itself waiting, and says so when the chain closes; below it, what the last
    in the chain wrote last.
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
    """Who waits for whom, for whom, ... in one sentence; and the last of them."""
    message, seen = wait.describe(now), {wait.waiter}
    while True:
        following = next((w for w in current if w.waiter == wait.whom), None)
        if following is None:
            return message, wait
        if following.waiter in seen:
            return f"{message}; they wait for each other", wait
        seen.add(following.waiter)
        message += f"; {following.describe(now)}"
        wait = following
