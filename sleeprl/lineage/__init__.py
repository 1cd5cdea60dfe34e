"""Lineage: generations of the model with parents and manifests, which can be restored."""

from sleeprl.lineage.store import LineageError, LineageStore, Manifest, Node

__all__ = ["LineageError", "LineageStore", "Manifest", "Node"]
