"""Generations of the model: each has a parent and a manifest, and can be restored."""

from sleeprl.lineage.store import LineageError, LineageStore, Manifest, Node

__all__ = ["LineageError", "LineageStore", "Manifest", "Node"]
