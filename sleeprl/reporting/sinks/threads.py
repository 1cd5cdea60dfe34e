"""Keeps sinks from holding up or ending a night: each works in a thread of its own."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sleeprl.plugins import create
from sleeprl.reporting.sinks.base import KIND, MetricsSink, SinkRun

CLOSE_TIMEOUT_S = 30.0
"""How long the end of a night waits for sinks to write what is left."""

_Row = tuple[str, int, Mapping[str, Any]]


class SinkThreads:
    """The sinks of a run, each in a daemon thread that starts with the first metrics.

    Guarantees:
        * ``log`` returns at once, also where a sink hangs.
        * A sink that fails is reported to ``warn`` once and gets nothing more; the others go on.
    """

    def __init__(self, names: Sequence[str], run: SinkRun, warn: Callable[[str], None]) -> None:
        """Prepare the sinks; none is opened yet.

        Args:
            names: Short names or dotted paths.
            run: What the sinks know of their run.
            warn: Shows a message to the user.
        """
        self._names, self._run, self._warn = names, run, warn
        self._queues: list[queue.SimpleQueue[_Row | None]] = []
        self._threads: list[threading.Thread] = []

    def log(self, phase: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Hand the metrics of one step to every sink."""
        if not self._threads:
            self._start()
        for waiting in self._queues:
            waiting.put((phase, step, dict(metrics)))

    def close(self) -> None:
        """Let every sink write what is left, for at most ``CLOSE_TIMEOUT_S`` in all."""
        for waiting in self._queues:
            waiting.put(None)
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for name, thread in zip(self._names, self._threads):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                self._warn(f"metrics sink {name} is still busy and was left behind")
        self._queues, self._threads = [], []

    def _start(self) -> None:
        for name in self._names:
            waiting: queue.SimpleQueue[_Row | None] = queue.SimpleQueue()
            thread = threading.Thread(
                target=self._serve, args=(name, waiting), name=f"sink-{name}", daemon=True
            )
            self._queues.append(waiting)
            self._threads.append(thread)
            thread.start()

    def _serve(self, name: str, waiting: queue.SimpleQueue[_Row | None]) -> None:
        """Open a sink, log what arrives, and close it."""
        try:
            sink: MetricsSink = create(name, KIND, {"run": self._run})
            try:
                while (row := waiting.get()) is not None:
                    sink.log(*row)
            finally:
                sink.close()
        except Exception as error:  # a tracker's fault must not end a night
            self._warn(
                f"metrics sink {name} failed and gets no more metrics: {type(error).__name__}: {error}"
            )
