"""A night is a transaction: killed again and again, it ends with the same model, committed once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_night import ROOT, SMALL, sleeprl, summary

from sleeprl.dreaming.position import Position
from sleeprl.files import sha256_file
from sleeprl.lineage import LineageStore
from sleeprl.trajectories.lake import Lake

# Dreams and roll-outs are written while the learner learns: which version writes a dream, and the
# last bit of a log-probability, depend on the moment. All else does not.
WORDS = [
    *SMALL,
    "wake.people=2",
    "baselines=[]",
    "dreaming.enabled=false",
    "consolidation.steps=32",
    "consolidation.rollout_prompts=0",
    "consolidation.checkpoint_every=8",
]


def steps(run: Path) -> int:
    """Steps of the consolidation that were told, over all attempts."""
    path = run / "metrics.jsonl"
    return path.read_text().count('"consolidation"') if path.is_file() else 0


def done(run: Path, phase: str) -> bool:
    path = run / "state.json"
    return path.is_file() and phase in json.loads(path.read_text())["results"]


def kill_when(moment: Callable[[], bool], place: Path, *words: str) -> None:
    """Run a night and SIGKILL it, with all its family, at that moment."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sleeprl.cli", "night", *words],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not moment():
        assert process.poll() is None, "the night was over before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_night_that_is_killed_at_every_turn_ends_as_if_it_was_not(tmp_path: Path) -> None:
    whole = sleeprl("night", "name=whole", "generations=whole", *WORDS, cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr[-3000:]

    run, store = tmp_path / "runs" / "cut", LineageStore(tmp_path / "cut")
    again = ["--resume", "runs/cut"]
    kill_when(lambda: done(run, "plan"), tmp_path, "name=cut", "generations=cut", *WORDS)
    kill_when(lambda: done(run, "self_study"), tmp_path, *again)
    kill_when(lambda: steps(run) >= 20, tmp_path, *again)
    heard = steps(run)
    assert not store.list()
    kill_when(lambda: bool(store.list()), tmp_path, *again)
    (first,) = store.list()
    finished = sleeprl("night", *again, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]

    told, cut = summary(tmp_path, "whole"), summary(tmp_path, "cut")
    assert [each.id for each in store.list()] == [first.id] == [cut["generation"]]
    assert store.head() == first.id and store.verify(first.id) == []
    hashes = [
        sha256_file(tmp_path / name / generation / "model.safetensors")
        for name, generation in (("whole", told["generation"]), ("cut", first.id))
    ]
    assert hashes[0] == hashes[1]
    for state in ("before", "before_with_context", "after"):
        assert told[state] == cut[state]
    # Workers run ahead of what a killed driver was told, so the sum may even be below 32.
    assert steps(run) < heard + 32, "the consolidation went on from a checkpoint"


def dreamt(run: Path) -> list[int]:
    """Updates of dreaming that were told, over all attempts."""
    path = run / "metrics.jsonl"
    rows = map(json.loads, path.read_text().splitlines()) if path.is_file() else ()
    return [row["step"] for row in rows if row["phase"] == "dreaming"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_dreaming_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    updates, groups, size = 5, 2, 4
    words = [
        *SMALL,
        "name=dreams",
        "wake.people=2",
        "baselines=[]",
        "consolidation.steps=16",
        f"dreaming.steps={updates}",
        f"dreaming.tasks_per_step={groups}",
        f"dreaming.group_size={size}",
        "gate.tolerance=0.9",
    ]
    run = tmp_path / "runs" / "dreams"
    kill_when(lambda: len(dreamt(run)) >= 2, tmp_path, *words)
    kept = Position.load(run / "dreaming-state")
    assert 2 <= kept.version < updates
    finished = sleeprl("night", "--resume", "runs/dreams", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    # A kill between the update and its record may tell an update twice, and trains it once.
    assert sorted(set(dreamt(run))) == list(range(1, updates + 1))
    assert len(dreamt(run)) <= updates + 1
    assert Position.load(run / "dreaming-state").version == updates
    dreams = Lake(run / "lake").read("trajectories", ["purpose"]).to_pylist()
    uids = [row["uid"] for row in dreams if row["purpose"] == "dream"]
    assert len(uids) == len(set(uids)) == updates * groups * size
    assert summary(tmp_path, "dreams")["generation"]
