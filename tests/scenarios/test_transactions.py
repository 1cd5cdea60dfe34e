"""A night is a transaction: killed again and again, it ends with the same model, committed once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from sleeprl.data.lake import Lake
from sleeprl.dreaming.checkpoint import DreamingCheckpoint
from sleeprl.lineage import LineageStore
from sleeprl.utils.files import sha256_file
from tests.scenarios.test_night import SMALL, sleeprl, summary
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

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


def steps(run: Path, phase: str = "consolidation") -> list[int]:
    """Steps of a phase that were told, over all attempts."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    lines = text.rpartition("\n")[0].splitlines()  # the last may be half written
    return [row["step"] for row in map(json.loads, lines) if row["phase"] == phase]


def done(run: Path, phase: str) -> bool:
    path = run / "state.json"
    return path.is_file() and phase in json.loads(path.read_text())["results"]


def night(place: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sleeprl.cli", "night", *words],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_until(moment: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not moment():
        assert process.poll() is None, "the night was over before its moment came"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_when(moment: Callable[[], bool], place: Path, *words: str) -> None:
    """Run a night and SIGKILL it, with all its family, at that moment."""
    process = night(place, *words)
    wait_until(moment, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


# By name, whether the moment of a kill has come.
KILLS: dict[str, Callable[[Path], bool]] = {
    "planned": lambda run: done(run, "plan"),
    "studied": lambda run: done(run, "self_study"),
    "half consolidated": lambda run: len(steps(run)) >= 20,
    "committed": lambda run: bool(LineageStore(run.parent.parent / "cut").list()),
}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(["half consolidated"], id="once"),
        pytest.param([*KILLS], marks=pytest.mark.soak, id="at every turn"),
    ],
)
def test_a_killed_night_ends_as_if_it_was_not(kills: list[str], tmp_path: Path) -> None:
    whole = sleeprl("night", "name=whole", "generations=whole", *WORDS, cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr[-3000:]

    run, store = tmp_path / "runs" / "cut", LineageStore(tmp_path / "cut")
    again = ["--resume", "runs/cut"]
    words = ["name=cut", "generations=cut", *WORDS]
    for name in kills:
        kill_when(partial(KILLS[name], run), tmp_path, *words)
        if name != "committed":
            assert not store.list()
            heard = len(steps(run))
        words = again
    committed = [each.id for each in store.list()]
    finished = sleeprl("night", *again, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]

    told, cut = summary(tmp_path, "whole"), summary(tmp_path, "cut")
    assert [each.id for each in store.list()] == [cut["generation"]]
    assert committed == ([cut["generation"]] if "committed" in kills else [])
    assert store.head() == cut["generation"] and store.verify(cut["generation"]) == []
    hashes = [
        sha256_file(tmp_path / name / generation / "model.safetensors")
        for name, generation in (("whole", told["generation"]), ("cut", cut["generation"]))
    ]
    assert hashes[0] == hashes[1]
    for state in ("before", "before_with_context", "after"):
        assert told[state] == cut[state]
    # Workers run ahead of what a killed driver was told, so the sum may even be below 32.
    assert len(steps(run)) < heard + 32, "the consolidation went on from a checkpoint"


@pytest.mark.timeout(1200)
def test_ctrl_c_ends_everything_and_a_night_killed_in_its_dreams_goes_on(tmp_path: Path) -> None:
    updates, groups, size = 4, 2, 4
    words = [*SMALL, "wake.people=2", "name=cut", "baselines=[]", f"dreaming.steps={updates}"]
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
    assert 2 <= kept.version < updates
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
