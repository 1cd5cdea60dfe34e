"""Actor processes that are started before there is work for them.

A process that holds a model imports for five seconds of CPU time. Where a core is idle meanwhile, as
while an engine starts, it can do that early: it knows what kind of actor it will be, and becomes that
actor when the arguments are known. ``WARM`` is this driver's pool.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import ray

from sleeprl.cluster.failures import Failure
from sleeprl.cluster.remote_actor import RemoteActor, classify
from sleeprl.config.schema import ResourcesConfig


def processes_may_wait(resources: ResourcesConfig) -> bool:
    """Decide whether a trainer's processes may hold their cores while they wait for work.

    Not where others may need them: a GPU, or a place in a cluster that is not this night's own.
    """
    return not (resources.learner_gpus or resources.elastic or resources.address)


class WarmProcess(RemoteActor):
    """A process that becomes an actor of a given kind later."""

    def __init__(self, kind: type[RemoteActor], prepare: Callable[[], object]) -> None:
        """Import the kind, and do what makes its start quick.

        Args:
            kind: Class of the actor.
            prepare: Imports what the actor will need; what it raises is left for the actor to meet.
        """
        self.kind = kind
        self._actor: RemoteActor | None = None
        self._failure: Failure | None = None
        try:
            prepare()
        except Exception as error:
            print(f"preparing for {kind.__name__}: {error!r}", flush=True)

    def become(self, *arguments: Any) -> None:
        """Construct the actor; where that fails, every call to it fails."""
        try:
            self._actor = self.kind(*arguments)
        except Exception as error:
            self._failure = classify(error)

    def apply(self, func: Callable[..., Any], **kwargs: Any) -> Any:
        """Call the actor."""
        if self._failure is not None:
            return self._failure
        actor = self if self._actor is None else self._actor
        return RemoteActor.apply(actor, func, **kwargs)


class WarmPool:
    """Prestarted processes by kind of actor. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[type[RemoteActor], list[Any]] = defaultdict(list)
        self._wanted: list[tuple[type[RemoteActor], Callable[[], object]]] = []
        self._thread: threading.Thread | None = None

    def prestart(self, kind: type[RemoteActor], count: int, prepare: Callable[[], object]) -> None:
        """Start processes in the background, one after another, that will be actors of a kind."""
        with self._lock:
            self._wanted += [(kind, prepare)] * count
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="prestart", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._thread = None
                    return
                kind, prepare = self._wanted.pop(0)
                process = ray.remote(WarmProcess).options(num_cpus=0).remote(kind, prepare)
                self._idle[kind].append(process)
            try:
                ray.get(process.ping.remote())
            except Exception:  # it is gone; who spawns one will notice, or Ray has shut down
                return

    def spawn(
        self, kind: type[RemoteActor], *arguments: Any, cpus: float = 0, gpus: float = 0.0
    ) -> Any:
        """Return the handle of a new actor: of a prestarted process if there is one, else of its own.

        Args:
            kind: Class of the actor.
            arguments: Of its constructor.
            cpus: Cores that a process of its own reserves; a prestarted one reserves none.
            gpus: GPUs that it reserves; with any, it is always a process of its own.
        """
        with self._lock:
            process = self._idle[kind].pop(0) if self._idle[kind] and not gpus else None
            if process is None:  # whoever comes late would only take a core from it
                self._wanted = [wanted for wanted in self._wanted if wanted[0] is not kind]
        if process is None:
            return ray.remote(kind).options(num_cpus=cpus, num_gpus=gpus).remote(*arguments)
        process.become.remote(*arguments)
        return process

    def clear(self) -> None:
        """End the processes that nobody needed."""
        with self._lock:
            self._wanted = []
            idle, self._idle = self._idle, defaultdict(list)
        for processes in idle.values():
            for process in processes:
                ray.kill(process)


WARM = WarmPool()
