"""Where a running job leaves its metrics for whoever shows them."""

from __future__ import annotations

from typing import Any

from sleeprl.cluster.remote_actor import RemoteActor


class MetricsQueue(RemoteActor):
    """A queue of small records; ``take`` empties it."""

    def __init__(self) -> None:
        self._items: list[dict[str, Any]] = []

    def put(self, item: dict[str, Any]) -> None:
        self._items.append(item)

    def take(self) -> list[dict[str, Any]]:
        items, self._items = self._items, []
        return items
