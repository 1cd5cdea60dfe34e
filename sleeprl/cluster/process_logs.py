"""The last lines that the processes of actors wrote, for a message about a stall."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ray

from sleeprl.cluster.failures import log_tail
from sleeprl.cluster.remote_actor import method_call, value_of

STALL_LINES = 3
"""How much of each process's log is shown."""


class ProcessLogs:
    """Finds the logs of actors on this host by the numbers of their processes."""

    def __init__(self) -> None:
        self._pids: dict[Any, Any] = {}
        """The reply to the question for its number, by actor."""

    def track(self, actors: Iterable[Any]) -> None:
        """Ask for the process of each before anything else: one that hangs cannot answer."""
        self._pids |= {a: a.apply.remote(method_call("pid")) for a in actors if a is not None}

    def tail(self, actors: Iterable[Any]) -> list[str]:
        """Return the last lines of each actor's log, after the name of its file. Does not wait."""
        refs = [self._pids[actor] for actor in actors if actor in self._pids]
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=0) if refs else ((), ())
        tail = []
        for pid in map(value_of, done):
            path, lines = log_tail(pid, STALL_LINES) if isinstance(pid, int) else (None, [])
            tail += [f"{path.name}: {line}" for line in lines if path is not None]
        return tail
