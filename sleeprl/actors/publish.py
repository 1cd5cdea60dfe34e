"""A learner's weights into the engines, with the proof that they arrived."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from sleeprl.actors.fleet import Fleet
from sleeprl.actors.learner import Learner
from sleeprl.files import atomic_path
from sleeprl.memory.checkpoint import EXPERT, WEIGHTS

CANARY = "canary.json"


def publish(learner: Learner, fleet: Fleet, canary: list[int]) -> dict[str, float]:
    """Send what the learner trained to every engine, in flight. Collective over the ranks.

    canary: token ids that both sides score afterwards. Returns how long generation
    stood still (seconds), how far the two sides differ (nats), and how many engines did not
    end verified; empty but on rank 0.
    """
    expected = learner.canary(canary)
    learner.release()  # engines that slept wake up now
    tensors = learner.export()
    if learner.rank != 0:
        learner.meet()
        for _ in tensors:  # the gathers are collective
            pass
        return {}
    try:
        try:
            update = fleet.begin()
        finally:
            learner.meet()  # no gather has begun that others would hold for as long as engines drain
        certificates = fleet.send(update, tensors, expected)
    finally:
        for _ in tensors:  # also when an engine died: the other ranks are in these gathers
            pass
    verified = [certificate for certificate in certificates if certificate.verified]
    return {
        "sync_seconds": max(c.seconds for c in verified),
        "canary": max(c.difference or 0.0 for c in verified),
        "stale_engines": float(len(certificates) - len(verified)),
    }


def save_trained(learner: Learner, directory: Path, canary: list[int]) -> None:
    """Write what was trained, and what an engine that holds it must answer. Collective.

    It is the expert alone, or of a model that was trained in full what it exports.
    """
    grown = learner.options.slot is not None
    tensors = learner.expert() if grown else dict(learner.export())
    expected = learner.canary(canary)
    if learner.rank == 0:
        expected.save(directory / CANARY)
        with atomic_path(directory / (EXPERT if grown else WEIGHTS)) as path:
            save_file(tensors, path)
