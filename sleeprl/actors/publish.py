"""A learner's weights into the engines, with the proof that they arrived."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from sleeprl.actors.fleet import Fleet
from sleeprl.actors.learner import Learner
from sleeprl.files import atomic_path
from sleeprl.memory.checkpoint import EXPERT

CANARY = "canary.json"


def publish(learner: Learner, fleet: Fleet, canary: list[int]) -> dict[str, float]:
    """Send what the learner trained to every engine, in flight. Collective over the ranks.

    canary: token ids that both sides score afterwards. Returns how long generation
    stood still (seconds) and how far the two sides differ (nats); empty but on rank 0.
    """
    expected = learner.canary(canary)
    tensors = learner.export()
    if learner.rank != 0:
        for _ in tensors:  # the gathers are collective
            pass
        return {}
    certificates = fleet.publish(tensors, expected)
    return {
        "sync_seconds": max(c.seconds for c in certificates),
        "canary": max(c.difference or 0.0 for c in certificates),
    }


def save_expert(learner: Learner, directory: Path, canary: list[int]) -> None:
    """Write the trained expert, and what an engine that holds it must answer. Collective."""
    expert, expected = learner.expert(), learner.canary(canary)
    if learner.rank == 0:
        expected.save(directory / CANARY)
        with atomic_path(directory / EXPERT) as path:
            save_file(expert, path)
