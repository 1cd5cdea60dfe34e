"""Generations of the model: each has a parent and a manifest, and can be restored."""

from sleeprl.lineage.compare import Diff, diff
from sleeprl.lineage.store import LineageError, LineageStore, Manifest, Node

__all__ = ["Diff", "LineageError", "LineageStore", "Manifest", "Node", "diff"]
