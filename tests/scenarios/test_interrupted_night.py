"""Ctrl-C ends a night and leaves nothing behind; one that is killed in its dreams goes on."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from sleeprl.data.lake import Lake
from sleeprl.dreaming.checkpoint import DreamingCheckpoint
from sleeprl.models.resolve import EMBEDDED
from tests.support.hub import publish, serve
from tests.support.nights import SMALL, kill_when, night, sleeprl, steps, summary, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def from_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The id of a model that has to be fetched, in shards, from a hub on this machine."""
    publish(EMBEDDED, tmp_path / "hub" / "org" / "model", "2MB")
    with serve(tmp_path / "hub") as hub:
        for name, value in hub.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        yield "org/model"


@pytest.mark.timeout(1200)
def test_ctrl_c_ends_everything_and_a_night_killed_in_its_dreams_goes_on(
    tmp_path: Path, from_hub: str
) -> None:
    updates, groups, size = 4, 2, 4
    words = [
        *SMALL,
        f"model.name={from_hub}",
        "wake.people=2",
        "name=cut",
        "baselines=[]",
        f"dreaming.steps={updates}",
    ]
    run = tmp_path / "runs" / "cut"
    process = night(tmp_path, *words)
    wait_until(lambda: len(steps(run)) > 20, process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "--resume" in out
    time.sleep(5)
    left = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True).stdout
    assert left == "", "processes outlived Ctrl-C"

    kill_when(lambda: len(steps(run, "dreaming")) >= 2, tmp_path, "--resume", "runs/cut")
    kept = DreamingCheckpoint.load(run / "dreaming-state")
    assert 1 <= kept.version < updates  # an update is recorded before it is kept
    finished = sleeprl("night", "--resume", "runs/cut", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    learnt = steps(run)
    assert learnt[-1] == 40
    again = [later for earlier, later in pairwise(learnt) if later <= earlier]
    assert 16 < min(again) <= 40, "the consolidation went on from a checkpoint"
    # A kill between the update and its record may tell an update twice, and trains it once.
    dreamt = steps(run, "dreaming")
    assert sorted(set(dreamt)) == list(range(1, updates + 1)) and len(dreamt) <= updates + 1
    assert DreamingCheckpoint.load(run / "dreaming-state").version == updates
    dreams = Lake(run / "lake").read("trajectories", ["purpose"]).to_pylist()
    uids = [row["uid"] for row in dreams if row["purpose"] == "dream"]
    assert len(uids) == len(set(uids)) == updates * groups * size
    assert summary(tmp_path, "cut")["after"]["recall"] > 0.2
    assert summary(tmp_path, "cut")["generation"]
