"""Calls to actors that are under way, a bounded number for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ray.exceptions import RayActorError

from sleeprl.cluster.failures import Failure
from sleeprl.cluster.remote_actor import classify, method_call


@dataclass(frozen=True)
class Result:
    """The end of one submitted call."""

    actor: int
    """The member that was called."""
    tag: str
    """What the caller named the call."""
    value: Any
    """What the call returned, or a Failure in its place."""

    @property
    def failure(self) -> Failure | None:
        return self.value if isinstance(self.value, Failure) else None


class InFlightCalls:
    """Bookkeeping around RLlib's FaultTolerantActorManager, which sends the calls.

    Which members may be given a call is not its business: its own idea of health is not used.
    """

    def __init__(self, limit: int) -> None:
        """
        Args:
            limit: The most calls under way per member.
        """
        self.limit = limit
        self._tags: dict[int, list[str]] = {}
        self._manager_ids: dict[int, int] = {}
        """The manager's number of each member that has been sent a call."""
        self._lost: list[Result] = []
        """Calls that ended with their member, to be returned by the next ``collect``."""

    @cached_property
    def _manager(self) -> Any:
        # Importing RLlib takes seconds; who only calls and waits does without.
        from ray.rllib.utils.actor_manager import FaultTolerantActorManager

        return FaultTolerantActorManager(max_remote_requests_in_flight_per_actor=self.limit)

    @property
    def outstanding(self) -> int:
        """Calls whose end ``collect`` has not returned yet."""
        return sum(map(len, self._tags.values())) + len(self._lost)

    def load(self, index: int) -> int:
        """Return how many calls to a member are under way."""
        return len(self._tags.get(index, ()))

    def submit(
        self, index: int, actor: Any, method: str, tag: str, kwargs: Mapping[str, Any]
    ) -> bool:
        """Send one call to a member; False where the manager takes none."""
        if index not in self._manager_ids:
            self._manager.add_actors([actor])
            self._manager_ids[index] = max(self._manager.actor_ids())
        sent = self._manager.foreach_actor_async(
            method_call(method),
            tag=tag,
            kwargs=kwargs,
            remote_actor_ids=[self._manager_ids[index]],
            healthy_only=False,
        )
        if sent:
            self._tags.setdefault(index, []).append(tag)
        return bool(sent)

    def collect(self, timeout: float) -> tuple[list[Result], list[int]]:
        """Take the calls that ended within ``timeout`` seconds.

        Returns:
            Their results, and the members whose process is gone. All calls to such a member end.
        """
        calls = []
        if self._manager_ids:
            calls = self._manager.fetch_ready_async_reqs(timeout_seconds=timeout)
        members = {number: index for index, number in self._manager_ids.items()}
        gone: list[int] = []
        results, self._lost = self._lost, []
        # What was done before its actor died is kept, so values come first.
        for call in sorted(calls, key=lambda call: not call.result_or_error.ok):
            index, answer = members[call.actor_id], call.result_or_error
            if call.tag not in self._tags.get(index, ()):
                continue  # it ended with the others of its actor
            if answer.ok:
                self._tags[index].remove(call.tag)
                results.append(Result(index, call.tag, answer.get()))
                continue
            if isinstance(answer.get(), RayActorError):
                gone.append(index)
            results += self.end_all(index, classify(answer.get()))  # the manager forgets them too
        return results, gone

    def end_all(self, index: int, failure: Failure) -> list[Result]:
        """End all calls to a member that are under way, and return them as failed."""
        return [Result(index, tag, failure) for tag in self._tags.pop(index, ())]

    def detach(self, index: int, failure: Failure) -> None:
        """Forget a member; the next ``collect`` returns its calls as failed."""
        self._lost += self.end_all(index, failure)
        if index in self._manager_ids:
            self._manager.remove_actor(self._manager_ids.pop(index))
